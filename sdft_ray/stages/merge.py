"""Stage `merge`: one student out of two, between their weights."""

from __future__ import annotations

import ray

from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.names import StepName


def run(job: StageContext) -> StageResult:
    """One task, bound by the disk like surgery; points of a grid are made side by side."""
    return ray.get(ray.remote(_merge).options(**remote_options(job.resources.prune), max_retries=3).remote(job))


def _merge(job: StageContext) -> StageResult:
    from sdft_ray.models.loading import check_finite
    from sdft_ray.training.merge import merge_checkpoints

    result = StageResult()
    kind, t = job.slice["kind"], job.slice["t"]
    job.phase("merging the weights")
    with UsageMeter() as meter, job.output(result) as directory:
        merge_checkpoints(job.input("first"), job.input("second"), directory, t, kind)
        check_finite(directory)
        arms = [StepName.parse(job.step.inputs[role]).subject for role in ("first", "second")]  # names are for people
        result.summary = {"arms": arms, "kind": kind, "t": t}
    result.usage = meter.usage()
    return result
