"""The effect of teacher correction (Minitron, arXiv:2408.11796): negative log-likelihood before and after.

Correction moves the teacher towards the data; self-data moves the data towards the teacher. Both texts of the same rows
are scored, so the figures show how far the teacher moved towards the references and away from its own rewrites.
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


def correction_verdict(changes_by_text: Mapping[str, Estimate]) -> str:
    """The changes in a sentence. A change counts if it exceeds two standard errors."""
    if not changes_by_text:
        return "No rewrite was kept, so there is nothing to measure the corrected teacher on."
    if any(change.stderr is None for change in changes_by_text.values()):
        return "A single row has no standard error, so it says nothing about the corrected teacher."
    parts = [f"{_movement(changes_by_text[text])} {name}" for text, name in _TEXTS.items()]
    return f"Correction moved the teacher {' and '.join(parts)}."


def _movement(change: Estimate) -> str:
    assert change.value is not None
    assert change.stderr is not None
    if abs(change.value) <= 2 * change.stderr:
        return "measurably neither nearer to nor further from"
    size = figure(Estimate(abs(change.value), change.stderr))
    return f"{size} nats per token {'nearer to' if change.value < 0 else 'further from'}"
