"""Stage `patch`: at every cut a linear map that imitates the removed blocks, fitted on the calibration set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import ray

from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.recipe.pruning import Patch
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, merge_usage, remote_options
from sdft_ray.stages.measure import calibration
from sdft_ray.stages.views import view
from sdft_ray.store import files
from sdft_ray.store.manifest import Usage


def run(job: StageContext) -> StageResult:
    """Sums from batches spread over tasks, merged by `+`; one more task fits and writes."""
    settings = job.resources.measure
    options = remote_options(settings)
    task = ray.remote(_shard).options(**options, max_retries=3)
    parts = [task.remote(job, index, settings.num_tasks) for index in range(settings.num_tasks)]
    return ray.get(ray.remote(_patched).options(**options, max_retries=3).remote(job, parts))


def _shard(job: StageContext, index: int, num_shards: int) -> tuple[bytes, Usage]:
    """What every `num_shards`-th batch shows at the cuts; all shards agree on the batches."""
    from sdft_ray.importance.patch import measure
    from sdft_ray.models.loading import load_model

    gpus, plan = job.resources.measure.gpus, _plan(job)
    with UsageMeter(gpus=gpus) as meter:
        job.phase("loading the models")
        tell = job.part(str(index))
        mine = calibration(job)[index::num_shards]
        models: list[Any] = [load_model(job.model(role), job.teacher.dtype) for role in ("start", "pruned")]
        source, pruned = (model.to("cuda" if gpus else "cpu") for model in models)

        def told() -> Iterator[Any]:
            for done, batch in enumerate(mine):
                tell(done, len(mine), "batches")
                yield batch[:2]

        moments = measure(source, pruned, told(), plan.keep_blocks, plan.channels.hidden)
    return moments.to_bytes(), meter.usage(moments.num_tokens)


def _patched(job: StageContext, parts: list[Any]) -> StageResult:
    """The pruned checkpoint with its patches merged into it."""
    from sdft_ray.importance.patch import PatchMoments, patched_tensors
    from sdft_ray.models.checkpoint import Checkpoint
    from sdft_ray.models.loading import check_finite
    from sdft_ray.models.replace import write_with

    result, ridge = StageResult(), view(Patch, {k: v for k, v in job.slice.items() if k != "max_tokens"}).ridge
    shards: list[tuple[bytes, Usage]] = ray.get(parts)
    job.phase("fitting the patches and writing the checkpoint")
    with UsageMeter(gpus=job.resources.measure.gpus) as meter, job.output(result) as directory:
        moments = reduce(add, [PatchMoments.from_bytes(content) for content, _ in shards])
        patches = moments.fit(ridge)
        pruned = job.input("pruned")
        tensors = patched_tensors(Checkpoint.open(pruned), patches)
        write_with(pruned, directory, tensors, max_shard_bytes=job.resources.max_shard_bytes)
        check_finite(directory)
        result.summary = {
            "num_tokens": moments.num_tokens,
            "residuals": [[patch.block, patch.residual_before, patch.residual_after] for patch in patches],
        }
    result.usage = merge_usage([meter.usage(), *(usage for _, usage in shards)])
    return result


def _plan(job: StageContext) -> PruningPlan:
    return PruningPlan.from_json((job.input("plan") / files.PLAN).read_text(encoding="utf-8"))
