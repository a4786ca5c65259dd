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
    from sdft_ray.data.subset import spread

    kept = kept_rows(job)
    return len(kept), [kept[position] for position in spread(len(kept), asked.num_rows)]


def kept_rows(job: StageContext) -> list[dict[str, Any]]:
    """The rows whose rewrite was kept, in order; with `held_out` as for `distilled_rows`."""
    from sdft_ray.data.held_out import held_out_mask

    columns = ["example_id", "instruction", "context", *TEXTS.values()]
    kept = pq.read_table(job.input("data") / files.DISTILLED, columns=columns, filters=[("source", "=", "distilled")])
    if fraction := job.slice.get("held_out"):
        kept = kept.filter(pa.array(held_out_mask(kept, fraction)))
    return kept.to_pylist()


def text_documents(chat: ChatFormat, rows: Sequence[dict[str, Any]]) -> dict[str, list[Document]]:
    """Text -> the rows' documents, in which it answers the prompt."""
    from sdft_ray.data.messages import row_prompt

    return {text: [chat.encode(row_prompt(row), row[column]) for row in rows] for text, column in TEXTS.items()}


Score = Callable[[Sequence["Document"], Callable[[int, int], None]], list["ResponseNll"]]
"""From documents, and a function that is told how many of how many are done, to what each costs a model."""


def scorer(job: StageContext, role: str) -> Score:
    """The model that is the input `role`, or the teacher where there is no such input, loaded once."""
    from sdft_ray.evaluation.shift import response_nll

    model, batch_tokens = loaded(job, role), job.resources.gap.batch_tokens
    return lambda documents, on_batch: response_nll(model, documents, batch_tokens=batch_tokens, on_batch=on_batch)


def loaded(job: StageContext, role: str) -> Any:
    """The model that is the input `role`, or the teacher where there is no such input, where the stage runs."""
    from sdft_ray.models.loading import load_model

    job.phase("loading the model")
    model: Any = load_model(job.model(role), job.teacher.dtype)
    return model.to("cuda" if job.resources.gap.gpus else "cpu")
