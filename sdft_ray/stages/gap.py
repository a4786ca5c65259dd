"""Stage `gap`: how far references and rewrites lie from teacher and pruned model, before anything is trained.

`gap:corrected` asks the same of the corrected teacher in place of the pruned model, on held-out rows if there are any.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, remote_options

if TYPE_CHECKING:
    from sdft_ray.data.packing import Document
    from sdft_ray.evaluation.shift import ResponseNll

COLUMNS = {"reference": "reference_response", "distilled": "response"}
"""Text -> its column among the rows whose rewrite was kept."""


def run(job: Job) -> Made:
    """One task, which holds one model at a time."""
    return ray.get(ray.remote(_gap).options(**remote_options(job.resources.gap), max_retries=3).remote(job))


def _gap(job: Job) -> Made:
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.evaluation.correction import changes, correction_verdict
    from sdft_ray.evaluation.shift import shift, verdict

    made = Made()
    with Meter(gpus=job.resources.gap.gpus) as meter, job.output(made) as directory:
        num_kept, rows = _kept_rows(job)
        chat = ChatFormat(load_tokenizer(job.model("teacher")))
        documents = [chat.encode(row["instruction"], row[column]) for column in COLUMNS.values() for row in rows]
        nll = {model: _nll(job, model, documents) for model in _models(job)} if rows else {}
        figures = shift(nll)
        made.summary = {"num_kept": num_kept, **asdict(figures), "verdict": verdict(figures)}
        if job.arm:
            moved = changes(nll)
            told = {text: asdict(change) for text, change in moved.items()}
            made.summary |= {"changes": told, "verdict": correction_verdict(moved)}
        per_row = [
            {
                "example_id": row["example_id"],
                **{model: {text: part[i]._asdict() for text, part in texts.items()} for model, texts in nll.items()},
            }
            for i, row in enumerate(rows)
        ]
        (directory / files.GAP).write_text(json.dumps({**made.summary, "rows": per_row}), encoding="utf-8")
    made.usage = meter.usage(len(nll) * sum(len(document.ids) for document in documents))
    return made


def _models(job: Job) -> tuple[str, str]:
    """The teacher, and the one that it is compared with."""
    return "teacher", job.arm or "pruned"


def _kept_rows(job: Job) -> tuple[int, list[dict[str, Any]]]:
    """How many rewrites were kept, and at most `num_rows` of those rows, spread over the set.

    Only held-out rows tell what a corrected teacher has not simply seen.
    """
    from sdft_ray.data.held_out import held_out_mask
    from sdft_ray.evaluation.shift import spread

    columns = ["example_id", "instruction", *COLUMNS.values()]
    kept = pq.read_table(job.input("data") / files.DISTILLED, columns=columns, filters=[("source", "=", "distilled")])
    if job.arm and job.recipe.train.held_out:
        kept = kept.filter(pa.array(held_out_mask(kept, job.recipe.train.held_out)))
    chosen = pa.array(spread(kept.num_rows, job.recipe.gap.num_rows), pa.int64())
    return kept.num_rows, kept.take(chosen).to_pylist()


def _nll(job: Job, model_name: str, documents: list[Document]) -> dict[str, list[ResponseNll]]:
    """Text -> its rows under one model; `documents` holds one text after the other."""
    from sdft_ray.evaluation.shift import response_nll
    from sdft_ray.models.loading import load_model

    settings = job.resources.gap
    models = _models(job)
    before = models.index(model_name) * len(documents)
    model: Any = load_model(job.model(model_name), job.recipe.teacher.dtype)
    scored = response_nll(
        model.to("cuda" if settings.gpus else "cpu"),
        documents,
        batch_tokens=settings.batch_tokens,
        on_batch=lambda done, total: job.progress(before + done, len(models) * total, "responses"),
    )
    num_rows = len(documents) // len(COLUMNS)
    return {text: scored[i * num_rows : (i + 1) * num_rows] for i, text in enumerate(COLUMNS)}
