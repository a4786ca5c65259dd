"""Schemas of the tables that stages exchange, and the id that joins their rows.

Rows are joined by `example_id`, never by position (Ray Data does not keep order).
"""

from __future__ import annotations

import hashlib
from typing import get_args

import pyarrow as pa

from sdft_ray.recipe.inputs import AnswerKind

ANSWER_KINDS: tuple[str, ...] = get_args(AnswerKind)
"""How the answer in a response is extracted and compared."""

SEED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("instruction", pa.string()),  # "" in a calibration set: the reference is plain text, not a response
        ("context", pa.string()),  # JSON of the prompt's messages beside that text, "" for most: see `data.messages`
        ("reference_response", pa.string()),
        ("answer_kind", pa.string()),  # one of ANSWER_KINDS
        ("check", pa.string()),  # additional input of the answer kind; "" for most
        ("family", pa.string()),  # the kind of task; "" where unknown
    ]
)
"""A seed set or a calibration set."""

GENERATED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("row_key", pa.binary(16)),  # digest of all that affects the answers, see `generation.chunks`
        ("sample_index", pa.int32()),  # 0-based among the samples of one prompt
        ("prompt_tokens", pa.int32()),
        ("response", pa.string()),
        ("response_tokens", pa.int32()),
        ("finish_reason", pa.string()),  # "stop" | "length" | "error"
        ("status", pa.string()),  # "ok" | "failed": the same for all samples of a row
        ("error", pa.string()),  # "" unless finish_reason is "error"
        # One per response token, the end token included; null unless the recipe asks for them (`data/signals.py`).
        ("response_ids", pa.list_(pa.int32())),  # present with any of the signals below, which refer to these
        ("top_ids", pa.large_binary()),
        ("top_logprobs", pa.large_binary()),
        ("hidden_states", pa.large_binary()),
    ]
)
"""The responses of the teacher, before selection. Failed rows have the same columns, in a separate table."""

SELECTED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("instruction", pa.string()),
        ("context", pa.string()),
        ("reference_response", pa.string()),
        ("distilled_response", pa.string()),
        ("response", pa.string()),  # the one to train on
        ("source", pa.string()),  # "distilled" | "reference": which of the two `response` is
        ("reason", pa.string()),
        ("answer_kind", pa.string()),
        ("check", pa.string()),
        ("family", pa.string()),
    ]
)
"""The distilled set: one row per seed row, with the selected response and the reason."""


def example_id(instruction: str, reference_response: str, context: str = "") -> str:
    """The default id of a row: the first 16 hex digits of a sha256 of its content.

    The length of the texts is part of the hash, so that moving text from one field to the other changes the id. A
    user may give other ids, so an id does not tell whether the content changed; caches use `generation.chunks.row_key`.
    """
    left = instruction.encode("utf-8", "surrogatepass")
    right = reference_response.encode("utf-8", "surrogatepass")
    content = b"%d:%b%b" % (len(left), left, right)
    if context:
        around = context.encode("utf-8", "surrogatepass")
        content = b"%d:%b%b" % (len(around), around, content)
    return hashlib.sha256(content).hexdigest()[:16]
