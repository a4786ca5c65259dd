"""Stage `prune`: stream a model's tensors into a checkpoint of the kept blocks and channels."""

from __future__ import annotations

import dataclasses

import ray

from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.store import files


def run(job: StageContext) -> StageResult:
    """One task: surgery is bound by the disk."""
    return ray.get(ray.remote(_prune).options(**remote_options(job.resources.prune), max_retries=3).remote(job))


def _prune(job: StageContext) -> StageResult:
    from sdft_ray.models.checkpoint import Checkpoint
    from sdft_ray.models.loading import check_finite
    from sdft_ray.models.size import size_of
    from sdft_ray.models.surgery import prune_checkpoint

    result = StageResult()
    with UsageMeter() as meter, job.output(result) as directory:
        plan = PruningPlan.from_json((job.input("plan") / files.PLAN).read_text(encoding="utf-8"))
        job.phase("writing the checkpoint")
        start = job.model("start")
        plan.validate(Checkpoint.open(start).config)
        max_shard_bytes = job.resources.max_shard_bytes
        prune_checkpoint(start, directory, plan.keep_blocks, plan.channels, max_shard_bytes=max_shard_bytes)
        job.phase("checking the checkpoint")
        checkpoint = Checkpoint.open(directory)
        checkpoint.check_expected()
        check_finite(directory)
        job.progress(len(plan.keep_blocks), len(plan.keep_blocks), "blocks")
        # Sizes are told beside the teacher's, whatever was pruned before.
        configs = {"teacher": Checkpoint.open(job.model("teacher")).config, "pruned": checkpoint.config}
        result.summary = {"sizes": {model: dataclasses.asdict(size_of(config)) for model, config in configs.items()}}
    result.usage = meter.usage()
    return result
