"""What correcting the teacher did (Minitron, arXiv:2408.11796): its negative log-likelihood before and after.

Correction moves the teacher to the data; self-data moves the data to the teacher. Measured on the same rows of both
texts, so that one sees how far it moved, and what it gave up of its own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdft_ray.evaluation.shift import ResponseNll, figure, paired_gap
from sdft_ray.statistics.estimate import Estimate

BEFORE, AFTER = "teacher", "corrected"
_TEXTS = {"reference": "references", "distilled": "its own rewrites"}


def changes(rows: Mapping[str, Mapping[str, Sequence[ResponseNll]]]) -> dict[str, Estimate]:
    """Text -> mean after less mean before, in nats per token, paired by row: below 0 where the teacher came nearer.

    `rows` is model -> text -> rows, as `shift` takes it; empty without rows.
    """
    if not rows:
        return {}
    return {text: paired_gap(after, rows[BEFORE][text]) for text, after in rows[AFTER].items()}


def correction_verdict(found: Mapping[str, Estimate]) -> str:
    """The changes in a sentence. One counts when it exceeds two standard errors."""
    if not found:
        return "No rewrite was kept, so there is nothing to measure the corrected teacher on."
    if any(change.stderr is None for change in found.values()):
        return "A single row has no standard error, so it says nothing about the corrected teacher."
    told = [f"{_told(found[text])} {name}" for text, name in _TEXTS.items()]
    return f"Correction moved the teacher {' and '.join(told)}."


def _told(change: Estimate) -> str:
    assert change.value is not None
    assert change.stderr is not None
    if abs(change.value) <= 2 * change.stderr:
        return "measurably neither nearer to nor further from"
    size = figure(Estimate(abs(change.value), change.stderr))
    return f"{size} nats per token {'nearer to' if change.value < 0 else 'further from'}"
