"""Stage `gap`: how far references and rewrites lie from teacher and pruned model, before anything is trained.

`gap:corrected` asks the same of the corrected teacher in place of the pruned model, on held-out rows if there are any.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import ray

from sdft_ray.recipe.recipe import Gap
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.seed_texts import TEXTS, distilled_rows, scored, text_documents
from sdft_ray.stages.views import view
from sdft_ray.statistics.estimate import plain
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.data.packing import Document
    from sdft_ray.evaluation.shift import ResponseNll


def run(job: StageContext) -> StageResult:
    """One task, which holds one model at a time."""
    return ray.get(ray.remote(_gap).options(**remote_options(job.resources.gap), max_retries=3).remote(job))


def _gap(job: StageContext) -> StageResult:
    from sdft_ray.evaluation.correction import changes, correction_verdict
    from sdft_ray.evaluation.shift import shift, verdict

    result = StageResult()
    with UsageMeter(gpus=job.resources.gap.gpus) as meter, job.output(result) as directory:
        # For a corrected teacher the slice names held-out rows: the others it has simply seen.
        num_kept, rows = distilled_rows(job, view(Gap, {k: v for k, v in job.slice.items() if k != "held_out"}))
        chat = job.teacher.chat
        documents = [document for text in text_documents(chat, rows).values() for document in text]
        nll = {model: _nll(job, model, documents) for model in _models(job)} if rows else {}
        figures = shift(nll)
        result.summary = {"num_kept": num_kept, **plain(figures), "verdict": verdict(figures)}
        if job.step.subject:
            moved = changes(nll)
            result.summary |= {
                "changes": {text: plain(change) for text, change in moved.items()},
                "verdict": correction_verdict(moved),
            }
        per_row = [
            {
                "example_id": row["example_id"],
                **{model: {text: part[i]._asdict() for text, part in texts.items()} for model, texts in nll.items()},
            }
            for i, row in enumerate(rows)
        ]
        (directory / files.GAP).write_text(json.dumps({**result.summary, "rows": per_row}), encoding="utf-8")
    result.usage = meter.usage(len(nll) * sum(len(document.ids) for document in documents))
    return result


def _models(job: StageContext) -> tuple[str, str]:
    """The teacher, and the one that it is compared with."""
    return "teacher", job.step.subject or "pruned"


def _nll(job: StageContext, model_name: str, documents: list[Document]) -> dict[str, list[ResponseNll]]:
    """Text -> its rows under one model; `documents` holds one text after the other."""
    models, num_rows = _models(job), len(documents) // len(TEXTS)
    before = models.index(model_name) * len(documents)
    nlls = scored(
        job,
        model_name,
        documents,
        lambda done, total: job.progress(before + done, len(models) * total, "responses"),
    )
    return {text: nlls[i * num_rows : (i + 1) * num_rows] for i, text in enumerate(TEXTS)}
