"""Stage `merge`: one student out of two, between their weights."""

from __future__ import annotations

import ray

from sdft_ray.stages.job import Job, Made, Meter, remote_options


def run(job: Job) -> Made:
    """One task, bound by the disk like surgery; points of a grid are made side by side."""
    return ray.get(ray.remote(_merge).options(**remote_options(job.resources.prune), max_retries=3).remote(job))


def _merge(job: Job) -> Made:
    from sdft_ray.models.loading import check_finite
    from sdft_ray.training.merge import merge_checkpoints

    made = Made()
    merge, t = job.recipe.merged[job.arm]
    with Meter() as meter, job.output(made) as directory:
        merge_checkpoints(job.input("first"), job.input("second"), directory, t, merge.kind)
        check_finite(directory)
        made.summary = {"arms": list(merge.arms), "kind": merge.kind, "t": t}
    made.usage = meter.usage()
    return made
