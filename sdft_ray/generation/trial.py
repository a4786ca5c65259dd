"""What a few rows say about rewriting templates: how many rewrites each keeps, which keeps most, and how surely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdft_ray.generation.selection import Reason
from sdft_ray.statistics.estimate import Estimate, Interval
from sdft_ray.statistics.shares import mcnemar_counts, wilson

NUM_EXAMPLES = 3
_SURE = 0.05
"""p-value below which a difference between two templates counts."""


@dataclass(frozen=True)
class Example:
    """A row and its rewrite; `reason` is that of selection, or "copy"."""

    example_id: str
    instruction: str
    reference: str
    rewrite: str
    reason: str


@dataclass(frozen=True)
class Distance:
    """Nats per token under the teacher of references and rewrites of the same rows, and by how much references cost
    more: what stage `gap` measures.
    """

    num_rows: int
    reference: Estimate
    rewrite: Estimate
    gap: Estimate


@dataclass(frozen=True)
class TemplateTrial:
    """One template. `own` is the share of rows whose rewrite is kept and no copy of the reference, with its interval.

    `is_own` says it row by row. `reasons` are those of selection, so "kept" counts copies too; `num_copies` are kept
    rewrites with the words of the reference. `length`: words of own rewrites over words of their references; None
    where there are none. A bare answer passes the check of a worked solution, and teaches no steps.
    """

    name: str
    num_rows: int
    reasons: Mapping[Reason, int]
    num_copies: int
    own: Interval
    is_own: tuple[bool, ...]
    length: float | None
    prompt_tokens: float
    response_tokens: float
    kept: tuple[Example, ...]
    others: tuple[Example, ...]
    distance: Distance | None = None

    @property
    def num_own(self) -> int:
        return sum(self.is_own)


@dataclass(frozen=True)
class Recommendation:
    """The template that keeps most, and the ones that cannot be told from it (p >= 0.05 by McNemar's exact test).

    `p_value` compares it with the recipe's template; None where it is that one.
    """

    template: str
    p_value: float | None
    alike: tuple[str, ...]


def trial_of(
    name: str, rows: Sequence[Mapping[str, Any]], prompt_tokens: float, response_tokens: float
) -> TemplateTrial:
    """From rows that `kept.chosen` returned; token counts are means over them."""
    copies = [row["reason"] == "kept" and is_copy(row["distilled_response"], row["reference_response"]) for row in rows]
    is_own = tuple(row["reason"] == "kept" and not copy for row, copy in zip(rows, copies, strict=True))
    examples = [_example(row, copy) for row, copy in zip(rows, copies, strict=True)]
    kept = [example for example, own in zip(examples, is_own, strict=True) if own]
    others = [example for example, own in zip(examples, is_own, strict=True) if not own]
    return TemplateTrial(
        name=name,
        num_rows=len(rows),
        reasons=dict(Counter(row["reason"] for row in rows).most_common()),
        num_copies=sum(copies),
        own=wilson(sum(is_own), len(rows)),
        is_own=is_own,
        length=_length([row for row, own in zip(rows, is_own, strict=True) if own]),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        kept=tuple(kept[:NUM_EXAMPLES]),
        others=tuple(others[:NUM_EXAMPLES]),
    )


def recommend(trials: Sequence[TemplateTrial], recipes: str) -> Recommendation:
    """Of at least one trial of the same rows; `recipes` is the name of the recipe's template.

    Among equals the recipe's own template comes first, then the one whose rewrites are nearest to the teacher.
    """

    def rank(trial: TemplateTrial) -> tuple[int, bool, float]:
        nats = trial.distance.rewrite.value if trial.distance else None
        return -trial.num_own, trial.name != recipes, float("inf") if nats is None else nats

    best = min(trials, key=rank)
    p_values = {other.name: _p_value(best, other) for other in trials if other.name != best.name}
    alike = tuple(name for name, p in p_values.items() if p >= _SURE)
    return Recommendation(best.name, p_values.get(recipes), alike)


def is_copy(rewrite: str, reference: str) -> bool:
    """Whether the two have the same words, whatever their spacing and case."""
    return rewrite.casefold().split() == reference.casefold().split()


def _length(rows: Sequence[Mapping[str, Any]]) -> float | None:
    before = sum(len(row["reference_response"].split()) for row in rows)
    return sum(len(row["distilled_response"].split()) for row in rows) / before if before else None


def _p_value(first: TemplateTrial, second: TemplateTrial) -> float:
    pairs = Counter(zip(first.is_own, second.is_own, strict=True))
    return mcnemar_counts(pairs[True, False], pairs[False, True]).p_value


def _example(row: Mapping[str, Any], copy: bool) -> Example:
    reason = "copy" if copy else row["reason"]
    return Example(row["example_id"], row["instruction"], row["reference_response"], row["distilled_response"], reason)
