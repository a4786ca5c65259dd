"""Named data sets of the Hugging Face Hub: train splits only, so that no evaluation question is trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sdft_ray.errors import DataError

Row = dict[str, Any]
LEFT_OUT = "left out"
"""The only column of a row that is not to be trained on: why."""


@dataclass(frozen=True)
class NamedSet:
    """One data set of the Hub, and the mapping of its rows to our columns.

    `fields` returns `instruction` and `reference`, or `messages`, and, where known, `answer_kind` and `family`; or the
    reason to leave the row out, as `LEFT_OUT`.
    """

    hub: str
    config: str | None
    fields: Callable[[Row], Row]
    split: str = "train"


def _gsm8k(row: Row) -> Row:
    """`question`; `answer` with the solution steps, ending in `#### N`."""
    return {"instruction": row["question"], "reference": row["answer"], "answer_kind": "number"}


def _dolly(row: Row) -> Row:
    """`instruction`, `context` (may be empty), `response`, `category`."""
    instruction = _with_context(row["instruction"], row["context"])
    return {"instruction": instruction, "reference": row["response"], "family": row["category"]}


def _alpaca_cleaned(row: Row) -> Row:
    """`instruction`, `input` (may be empty), `output`."""
    instruction = _with_context(row["instruction"], row["input"])
    return {"instruction": instruction, "reference": row["output"]}


def _openmath1(row: Row) -> Row:
    """`question`, `generated_solution` (ends in a box, may have code), `expected_answer`, `is_correct`, `dataset`."""
    if not row["is_correct"]:
        return {LEFT_OUT: "its solution is marked as wrong"}
    return _openmath(row["question"], row["generated_solution"], row["expected_answer"], row["dataset"])


def _openmath2(row: Row) -> Row:
    """`problem`, `generated_solution`, `expected_answer`, `problem_source`."""
    return _openmath(row["problem"], row["generated_solution"], row["expected_answer"], row["problem_source"])


_NUMERIC = re.compile(r"-?\$?[\d,]+(?:\.\d+)?%?|-?\d+/\d+|-?\\d?frac\{\d+\}\{\d+\}")


def _openmath(question: str, solution: str, expected: str, source: str) -> Row:
    """An expected answer that is not a number (a formula) is compared as text."""
    kind = "number" if _NUMERIC.fullmatch(expected.strip()) else "text"
    return {"instruction": question, "reference": solution, "answer_kind": kind, "family": source}


def _tulu(row: Row) -> Row:
    """`messages`, `source`."""
    return {"messages": row["messages"], "family": row["source"]}


def _ultrachat(row: Row) -> Row:
    """`messages`."""
    return {"messages": row["messages"]}


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
"""Names that a recipe may give as a source instead of a file."""


def named_records(name: str, rows: Iterator[Row]) -> Iterator[tuple[str, Row]]:
    """Rows in our columns. Ids are indices into the split (`gsm8k-0`), because upstream sets contain duplicates."""
    fields = NAMED_SETS[name].fields
    for index, row in enumerate(rows):
        yield f"row {index + 1}", {"id": f"{name}-{index}", **fields(row)}


def hub_records(name: str, revision: str | None = None) -> Iterator[tuple[str, Row]]:
    """Download the train split at commit `revision` (or read it from the local cache), in our columns.

    Raises `DataError` if the Hub cannot be reached.
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
    """The current commit of a named set; None in offline mode, where the local cache is used.

    This request also fails fast without a network: `datasets` would retry for half a minute.
    Raises `DataError` if the Hub cannot be reached.
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
        f"cannot download {name} ({NAMED_SETS[name].hub}): {line}",
        "check the network, download it first and set HF_HUB_OFFLINE=1, or give a .jsonl or .parquet file",
    )
