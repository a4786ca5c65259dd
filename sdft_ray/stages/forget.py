"""Stage `forget`: how surprising held-out texts and both texts of the seed set are to one model, and how far it is
from the teacher on the teacher's own answers.

Seed rows are the ones that nothing was trained on where the recipe holds any out, else kept ones; at most
`gap.num_rows` of them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import ray

from sdft_ray.recipe.inputs import Forgetting
from sdft_ray.recipe.recipe import Gap
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.seed_texts import distilled_rows, loaded, scorer, text_documents
from sdft_ray.stages.views import view
from sdft_ray.statistics.estimate import plain
from sdft_ray.store import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdft_ray.data.packing import Document
    from sdft_ray.evaluation.divergence import TeacherKl

Named = dict[str, "Document"]
"""Documents by the ids of their rows."""


def run(job: StageContext) -> StageResult:
    """One task, which holds one model."""
    return ray.get(ray.remote(_forget).options(**remote_options(job.resources.gap), max_retries=3).remote(job))


def _forget(job: StageContext) -> StageResult:
    from sdft_ray.evaluation.shift import mean_nll

    result = StageResult()
    with UsageMeter(gpus=job.resources.gap.gpus) as meter, job.output(result) as directory:
        num_kept, texts = _texts(job)
        documents = [document for text in texts.values() for document in text.values()]
        nlls = iter(scorer(job, "model")(documents, lambda done, total: job.progress(done, total, "texts")))
        found = {text: {name: next(nlls) for name in named} for text, named in texts.items()}
        figures = {text: mean_nll(list(rows.values())) for text, rows in found.items()}
        divergence = _divergence(job, list(texts.get("distilled", {}).values()))
        result.summary = {
            "num_kept": num_kept,
            "held_out": bool(job.slice.get("held_out")),
            "num_rows": {text: len(rows) for text, rows in found.items()},
            "num_tokens": {text: sum(row.num_tokens for row in rows.values()) for text, rows in found.items()},
            "nll": {text: {"value": mean.value, "stderr": mean.stderr} for text, mean in figures.items()},
            **({"kl": plain(divergence)} if divergence else {}),
        }
        rows = {text: {name: row._asdict() for name, row in rows.items()} for text, rows in found.items()}
        (directory / files.FORGET).write_text(json.dumps({**result.summary, "rows": rows}), encoding="utf-8")
    result.usage = meter.usage(sum(len(document.ids) for document in documents))
    return result


def _divergence(job: StageContext, answers: list[Document]) -> TeacherKl | None:
    """The model's from the teacher, on the teacher's answers; None for the teacher itself, and without answers."""
    from sdft_ray.evaluation.divergence import teacher_kl, token_kl

    if "model" not in job.inputs or not answers:
        return None
    # Two models and the logits of both: half the tokens at once.
    batch_tokens = max(1, job.resources.gap.batch_tokens // 2)
    on_batch: Callable[[int, int], None] = lambda done, total: job.progress(done, total, "answers")  # noqa: E731
    pair = loaded(job, "teacher"), loaded(job, "model")
    return teacher_kl(token_kl(*pair, answers, batch_tokens=batch_tokens, on_batch=on_batch))


def _texts(job: StageContext) -> tuple[int, dict[str, Named]]:
    """How many rewrites could be scored, and the documents of each kind of text that has any."""
    from sdft_ray.data.calibration import row_documents

    asked = {name: value for name, value in job.slice.items() if name == "max_tokens"}
    max_tokens = view(Forgetting, asked, given={"source": ""}, absent=("source", "num_rows")).max_tokens
    table = pq.read_table(job.input("texts") / files.ROWS)
    held_out = row_documents(table, job.teacher.tokenizer, max_tokens, job.teacher.chat_settings)
    texts = {"text": dict(zip(table["example_id"].to_pylist(), held_out, strict=True))}
    num_kept, rows = distilled_rows(job, view(Gap, job.slice["gap"]))
    if rows:
        names = [row["example_id"] for row in rows]
        for text, documents in text_documents(job.teacher.chat, rows).items():
            texts[text] = dict(zip(names, documents, strict=True))
    return num_kept, texts
