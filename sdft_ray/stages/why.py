"""Stage `why`: what the model that pruning starts from scores without some of its blocks, nothing else changed.

The checkpoint is written to a temporary folder and thrown away: only scores are kept.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import ray

from sdft_ray.stages.evaluate import evaluate_model
from sdft_ray.stages.evaluators import answers, open_sampler
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.samplers import prepare_process


def run(job: StageContext) -> StageResult:
    """One task per removal; they run side by side as the cluster allows."""
    return ray.get(ray.remote(_why).options(**remote_options(job.resources.evaluate), max_retries=3).remote(job))


def _why(job: StageContext) -> StageResult:
    from sdft_ray.models.checkpoint import Checkpoint
    from sdft_ray.models.surgery import drop_blocks

    prepare_process()
    result, start, removed = StageResult(), job.model("start"), set(job.slice["blocks"])
    with (
        UsageMeter(gpus=job.resources.evaluate.gpus) as meter,
        tempfile.TemporaryDirectory(prefix="sdft-why-") as folder,
    ):
        keep = [block for block in range(Checkpoint.open(start).num_blocks) if block not in removed]
        drop_blocks(start, Path(folder), keep, max_shard_bytes=job.resources.max_shard_bytes)
        sampler = open_sampler(job, Path(folder))
        try:
            evaluate_model(job, Path(folder), partial(answers, sampler), result)
        finally:
            sampler.close()
    result.usage = meter.usage()
    return result
