"""Named data sets of the Hugging Face hub: train split only, so that no evaluation question is trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sdft_ray.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class NamedSet:
    """One data set of the hub, and how a row of it reads in our columns.

    `fields` gives `instruction`, `reference` and, where known, `answer_kind` and `family`; None for a row with
    nothing to train on, which is no part of the named set. Nor is a row whose reference is empty.
    """

    hub: str
    config: str | None
    fields: Callable[[Row], Row | None]
    split: str = "train"


def _gsm8k(row: Row) -> Row:
    """`question`; `answer` with its working, ending in `#### N`."""
    return {"instruction": row["question"], "reference": row["answer"], "answer_kind": "number"}


def _dolly(row: Row) -> Row:
    """`instruction`, `context` (may be empty), `response`, `category`."""
    instruction = _with_context(row["instruction"], row["context"])
    return {"instruction": instruction, "reference": row["response"], "family": row["category"]}


def _alpaca_cleaned(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output`."""
    instruction = _with_context(row["instruction"], row["input"])
    return {"instruction": instruction, "reference": row["output"]}


def _openmath1(row: Row) -> Row | None:
    """`question`, `generated_solution` (ends in a box, may hold code), `expected_answer`, `is_correct`, `dataset`."""
    if not row["is_correct"]:
        return None
    return _openmath(row["question"], row["generated_solution"], row["expected_answer"], row["dataset"])


def _openmath2(row: Row) -> Row:
    """`problem`, `generated_solution`, `expected_answer`, `problem_source`."""
    return _openmath(row["problem"], row["generated_solution"], row["expected_answer"], row["problem_source"])


_NUMERIC = re.compile(r"-?\$?[\d,]+(?:\.\d+)?%?|-?\d+/\d+|-?\\d?frac\{\d+\}\{\d+\}")


def _openmath(question: str, solution: str, expected: str, source: str) -> Row:
    """Formulas are compared as text: what is no number has no other exact form here."""
    kind = "number" if _NUMERIC.fullmatch(expected.strip()) else "text"
    return {"instruction": question, "reference": solution, "answer_kind": kind, "family": source}


def _tulu(row: Row) -> Row | None:
    """`messages`, `source`."""
    turn = first_turn(row["messages"])
    return turn and {**turn, "family": row["source"]}


def _ultrachat(row: Row) -> Row | None:
    """`messages`."""
    return first_turn(row["messages"])


def first_turn(messages: Any) -> Row | None:
    """The first question and its answer out of a conversation (a list of `role` and `content`).

    A system message stands before the question. None when the conversation does not begin that way.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        return None
    roles = [message.get("role") for message in messages]
    start = 1 if roles[:1] == ["system"] else 0
    texts = [message.get("content") for message in messages[: start + 2]]
    if roles[start : start + 2] != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        return None
    return {"instruction": "\n\n".join(text for text in texts[:-1] if text.strip()), "reference": texts[-1]}


def _with_context(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


NAMED_SETS: Mapping[str, NamedSet] = {
    "gsm8k": NamedSet("openai/gsm8k", "main", _gsm8k),
    "dolly": NamedSet("databricks/databricks-dolly-15k", None, _dolly),
    "alpaca_cleaned": NamedSet("yahma/alpaca-cleaned", None, _alpaca_cleaned),
    "openmath_instruct_1": NamedSet("nvidia/OpenMathInstruct-1", None, _openmath1),
    "openmath_instruct_2": NamedSet("nvidia/OpenMathInstruct-2", None, _openmath2),
    "tulu3": NamedSet("allenai/tulu-3-sft-mixture", None, _tulu),
    "ultrachat": NamedSet("HuggingFaceH4/ultrachat_200k", None, _ultrachat, split="train_sft"),
}
"""What a recipe may name as a source in place of a file."""


def named_records(name: str, rows: Iterator[Row]) -> Iterator[tuple[str, Row]]:
    """Rows in our columns. Ids count rows of the split (`gsm8k-0`): upstream sets hold some rows twice."""
    fields = NAMED_SETS[name].fields
    for index, row in enumerate(rows):
        ours = fields(row)
        if ours is not None and ours["reference"].strip() and ours["instruction"].strip():
            yield f"row {index + 1}", {"id": f"{name}-{index}", **ours}


def hub_records(name: str, revision: str | None = None) -> Iterator[tuple[str, Row]]:
    """Download (or find in the local cache) the train split at commit `revision`, and read it in our columns.

    Raises `DataError` when the hub cannot be reached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    named = NAMED_SETS[name]
    try:
        rows = load_dataset(named.hub, named.config, split=named.split, revision=revision or hub_commit(name))
    except (DatasetsError, HTTPError, OSError) as reason:
        raise _unreachable(name, reason) from None
    return named_records(name, (cast(Row, row) for row in rows))


def hub_commit(name: str) -> str | None:
    """The commit that a named set stands at now; None in offline mode, where the local cache decides.

    Asking first also fails at once where there is no network: `datasets` would try for half a minute.
    Raises `DataError` when the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(NAMED_SETS[name].hub, timeout=10).sha
    except OfflineModeIsEnabled:
        return None
    except (HTTPError, OSError) as reason:
        raise _unreachable(name, reason) from None


def _unreachable(name: str, reason: BaseException) -> DataError:
    line = (str(reason).splitlines() or [type(reason).__name__])[0]
    return DataError(
        f"cannot fetch {name} ({NAMED_SETS[name].hub}): {line}",
        "check the network, download it first and set HF_HUB_OFFLINE=1, or give a .jsonl or .parquet file",
    )
