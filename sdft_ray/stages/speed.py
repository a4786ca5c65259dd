"""Stage `speed`: speed and memory of teacher and pruned model, taken in turns in one process.

Students have the pruned model's shapes, and so its speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from sdft_ray.recipe.scoring import Speed
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.views import view
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.evaluation.speed import ModelSpeed


def run(job: StageContext) -> StageResult:
    """One task that has the cluster's CPUs to itself: see `StageSpec.runs_alone`."""
    return ray.get(ray.remote(_speed).options(**remote_options(job.resources.speed), max_retries=3).remote(job))


def _speed(job: StageContext) -> StageResult:
    result = StageResult()
    with UsageMeter(gpus=job.resources.speed.gpus) as meter, job.output(result) as directory:
        models = {"teacher": job.model("teacher"), "pruned": job.input("pruned")}
        asked = view(Speed, job.slice)
        job.phase("loading the models")
        figures = speeds(job, models, asked, asked.batches, lambda done, total: job.progress(done, total, "rounds"))
        plain = {model: asdict(figure) for model, figure in figures.items()}
        (directory / files.SPEED).write_text(json.dumps(plain), encoding="utf-8")
        result.summary = {"speed": plain}
    result.usage = meter.usage()
    return result


def speeds(
    job: StageContext,
    models: Mapping[str, Path],
    asked: Speed,
    batch_rows: Sequence[int],
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, ModelSpeed]:
    """Speed of checkpoints, by name, at these batch sizes and otherwise as `asked`, in this process."""
    from sdft_ray.evaluation.speed import measure_speed

    return measure_speed(
        models,
        batch_rows=batch_rows,
        prompt_tokens=asked.prompt_tokens,
        new_tokens=asked.new_tokens,
        rounds=asked.rounds,
        dtype=job.teacher.dtype,
        device="cuda" if job.resources.speed.gpus else "cpu",
        on_round=on_round,
    )
