"""Stage `rate`: which of the models that a recipe allows decodes fast enough, found by measuring some of them.

Of the batch sizes in `speed` the largest alone counts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import ray

from sdft_ray.models.channels import config_with_sizes
from sdft_ray.models.config import config_with_blocks
from sdft_ray.pruning.target import Candidate, describe, first_that_meets, path
from sdft_ray.recipe.scoring import Speed
from sdft_ray.stages.amounts import start_config
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.speed import speeds
from sdft_ray.stages.views import pruning_view, view
from sdft_ray.store import files


def run(job: StageContext) -> StageResult:
    """One task that has the cluster's CPUs to itself: see `StageSpec.runs_alone`."""
    return ray.get(ray.remote(_rate).options(**remote_options(job.resources.speed), max_retries=3).remote(job))


def _rate(job: StageContext) -> StageResult:
    """Halve the way from the whole model to the smallest until the largest that is fast enough is found."""
    asked, config = pruning_view(job.step), start_config(job)
    target = asked.target
    assert target is not None, "a recipe without a target has no such step"
    tried: list[dict[str, object]] = []

    def meets(candidate: Candidate) -> bool:
        job.phase(f"measuring {describe(candidate)}")
        whole, rate = _decoding(
            job, config_with_sizes(config_with_blocks(config, range(candidate.num_blocks)), candidate.sizes)
        )
        enough = rate / whole >= target.speedup if target.speedup is not None else rate >= (target.tokens_per_s or 0)
        tried.append({"model": describe(candidate), "tokens_per_s": rate, "speedup": rate / whole, "enough": enough})
        job.progress(len(tried), 0, "models measured")
        return enough

    result = StageResult()
    with UsageMeter(gpus=job.resources.speed.gpus) as meter, job.output(result) as directory:
        allowed = path(asked.depth, asked.width, config, dtype=job.teacher.dtype)
        chosen = first_that_meets(
            allowed,
            meets,
            lambda: "; ".join(
                f"{one['tokens_per_s']:,.0f} tokens/s ({one['speedup']:.2f} times) with {one['model']}"
                for one in tried[-3:]
            ),
        )
        depth, width = chosen.amounts(asked.depth, asked.width, config)
        content = {"depth": depth.model_dump(mode="json"), "width": width and width.model_dump(mode="json")}
        (directory / files.AMOUNTS).write_text(json.dumps(content), encoding="utf-8")
        result.summary = {"chosen": describe(chosen), "tried": tried}
    result.usage = meter.usage()
    return result


def _decoding(job: StageContext, config: dict[str, object]) -> tuple[float, float]:
    """Tokens per second of the model that pruning starts from and of one of this config, whatever its weights."""
    from sdft_ray.models.loading import write_random

    with tempfile.TemporaryDirectory(prefix="sdft-rate-") as folder:
        write_random(config, Path(folder), job.teacher.dtype)
        models = {"start": job.model("start"), "candidate": Path(folder)}
        asked = view(Speed, job.slice["speed"])
        found = speeds(job, models, asked, (asked.largest_batch,))
    start, candidate = (found[name].batches[0].decode.median for name in ("start", "candidate"))
    return start, candidate
