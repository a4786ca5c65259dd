"""What models answered, item by item, read from the artifacts of their evaluations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdft_ray.report.comparison.model import Answers, Response
from sdft_ray.statistics.scores import TaskScore

Key = tuple[str, str]
"""Task and item."""
_MARKS = ("task", "item", "target", "num_tokens", "truncated", "no_answer")
_TEXTS = ("task", "item", "prompt", "response", "filtered", "truncated", "no_answer")


@dataclass(frozen=True)
class Mark:
    """All about an answer but its words; None where it does not apply."""

    target: str
    num_tokens: int | None
    truncated: bool | None
    no_answer: bool | None


def read_marks(path: Path) -> dict[Key, Mark]:
    """Of every answer; long texts stay on disk."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=list(_MARKS)).to_pylist()
    return {
        (row["task"], row["item"]): Mark(row["target"], row["num_tokens"], row["truncated"], row["no_answer"])
        for row in rows
    }


def read_answers(path: Path, keys: Collection[Key]) -> dict[Key, tuple[str, Response]]:
    """Prompt and answer of the items in `keys`, as far as the file has them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not keys:
        return {}
    wanted = pc.field("task").isin({task for task, _ in keys}) & pc.field("item").isin({item for _, item in keys})
    rows = pq.read_table(path, columns=list(_TEXTS), filters=wanted).to_pylist()
    return {
        (row["task"], row["item"]): (
            row["prompt"],
            Response(row["response"], row["filtered"], bool(row["truncated"]), bool(row["no_answer"])),
        )
        for row in rows
        if (row["task"], row["item"]) in keys
    }


def count_answers(score: TaskScore, marks: Mapping[Key, Mark]) -> Answers | None:
    """Of a task whose items are right or wrong; None where an answer was not kept, or format does not apply to it."""
    marked = [(value, marks.get((score.task, item))) for item, value in score.items.items()]
    answers = [(value, mark) for value, mark in marked if mark is not None and mark.no_answer is not None]
    if not answers or len(answers) < len(marked):
        return None
    num_right = sum(value == 1 for value, _ in answers)
    num_no_answer = sum(value != 1 and bool(mark.no_answer) for value, mark in answers)
    return Answers(
        num_right=num_right,
        num_wrong=len(answers) - num_right - num_no_answer,
        num_no_answer=num_no_answer,
        num_truncated=_known_sum([mark.truncated for _, mark in answers]),
        mean_tokens=_known_mean([mark.num_tokens for _, mark in answers]),
    )


def _known_sum(values: Sequence[bool | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _known_mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
