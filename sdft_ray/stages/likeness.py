"""Stage `likeness`: how alike what a model wrote in its evaluation is to what the teacher wrote."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import ray

from sdft_ray.errors import EvaluationError
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.statistics.estimate import plain
from sdft_ray.store import files

_COLUMNS = ["task", "item", "response", "num_tokens"]


def run(job: StageContext) -> StageResult:
    """One task, which holds the embedding model."""
    return ray.get(ray.remote(_likeness).options(**remote_options(job.resources.gap), max_retries=3).remote(job))


def _likeness(job: StageContext) -> StageResult:
    from sdft_ray.evaluation.similarity import answer_pairs, likeness, load_embedder

    settings, result, source = job.resources.gap, StageResult(), job.places.embedding
    assert source is not None, "a step of likeness has an embedding model"
    with UsageMeter(gpus=settings.gpus) as meter, job.output(result) as directory:
        pairs = answer_pairs(_answers(job, "teacher_answers"), _answers(job, "answers"))
        job.phase("loading the embedding model")
        embedder = load_embedder(source.fetch(), "cuda" if settings.gpus else "cpu")
        found, values = likeness(
            embedder,
            pairs,
            batch_tokens=settings.batch_tokens,
            on_batch=lambda done, total: job.progress(done, total, "answers"),
        )
        result.summary = plain(found)
        items = [
            {"task": pair.task, "item": pair.item, "similarity": value}
            for pair, value in zip(pairs, values, strict=True)
        ]
        (directory / files.LIKENESS).write_text(json.dumps({**result.summary, "items": items}), encoding="utf-8")
    result.usage = meter.usage()
    return result


def _answers(job: StageContext, role: str) -> list[dict[str, str]]:
    """What was written in an evaluation, not chosen: items whose number of tokens is known."""
    path = job.input(role) / files.ITEMS
    if not path.is_file():
        raise EvaluationError(
            f"{job.inputs[role]} has no stored answers, because an earlier version wrote it",
            "remove that folder and run again",
        )
    return pq.read_table(path, columns=_COLUMNS, filters=[("num_tokens", ">=", 0)]).to_pylist()
