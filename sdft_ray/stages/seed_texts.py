"""Both texts of the seed set, and how surprising texts are to one model: what `gap` and `forget` do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.recipe.recipe import Gap
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.data.chat import ChatFormat
    from sdft_ray.data.packing import Document
    from sdft_ray.evaluation.shift import ResponseNll

TEXTS = {"reference": "reference_response", "distilled": "response"}
"""Text -> its column among the rows whose rewrite was kept."""


def distilled_rows(job: StageContext, asked: Gap) -> tuple[int, list[dict[str, Any]]]:
    """How many rewrites were kept, and at most `asked.num_rows` of those rows, spread over the set.

    Where the step's slice has `held_out`, only rows count that nothing was trained on.
    """
    from sdft_ray.data.held_out import held_out_mask
    from sdft_ray.data.subset import spread

    columns = ["example_id", "instruction", "context", *TEXTS.values()]
    kept = pq.read_table(job.input("data") / files.DISTILLED, columns=columns, filters=[("source", "=", "distilled")])
    if fraction := job.slice.get("held_out"):
        kept = kept.filter(pa.array(held_out_mask(kept, fraction)))
    chosen = pa.array(spread(kept.num_rows, asked.num_rows), pa.int64())
    return kept.num_rows, kept.take(chosen).to_pylist()


def text_documents(chat: ChatFormat, rows: Sequence[dict[str, Any]]) -> dict[str, list[Document]]:
    """Text -> the rows' documents, in which it answers the prompt."""
    from sdft_ray.data.messages import row_prompt

    return {text: [chat.encode(row_prompt(row), row[column]) for row in rows] for text, column in TEXTS.items()}


def scored(
    job: StageContext, role: str, documents: Sequence[Document], on_batch: Callable[[int, int], None]
) -> list[ResponseNll]:
    """What `documents` cost the model that is the input `role`, or the teacher where there is no such input."""
    from sdft_ray.evaluation.shift import response_nll
    from sdft_ray.models.loading import load_model

    settings = job.resources.gap
    job.phase("loading the model")
    model: Any = load_model(job.model(role), job.teacher.dtype)
    return response_nll(
        model.to("cuda" if settings.gpus else "cpu"), documents, batch_tokens=settings.batch_tokens, on_batch=on_batch
    )
