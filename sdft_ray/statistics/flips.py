"""Flips: items that one model answers rightly and another wrongly, and the other way round.

Two models may have the same accuracy and answer differently, which a difference of means does not show; compressed
models do (arXiv:2407.09141). A share of flips is binomial over the items; its limits are Wilson's (1927, JASA 22).
Over several tasks the counts are added up, so each item weighs the same; limits of the sum are then slightly too wide,
since tasks are fixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.estimate import Interval
from sdft_ray.statistics.scores import TaskScore
from sdft_ray.statistics.shares import wilson


@dataclass(frozen=True)
class Flips:
    """Shares of `num_items`, in [0, 1], with their 95 % limits; the first model is the one that is compared with."""

    num_items: int
    right_to_wrong: Interval
    wrong_to_right: Interval

    @property
    def share(self) -> float:
        """Of items that changed at all."""
        return (self.right_to_wrong.value or 0.0) + (self.wrong_to_right.value or 0.0)


def is_binary(*scores: TaskScore) -> bool:
    """Whether every item of the scores is right or wrong, and right is better."""
    return all(score.higher_is_better and score.items and set(score.items.values()) <= {0.0, 1.0} for score in scores)


def flips(pairs: Iterable[tuple[TaskScore, TaskScore]], *, level: float = 0.95) -> Flips | None:
    """Over all pairs whose items are right or wrong; None where there are none. Items are paired by their names.

    Raises `EvaluationError` where the two models of a pair were not scored on the same items.
    """
    num_items = lost = gained = 0
    for first, second in pairs:
        if not is_binary(first, second):
            continue
        if first.items.keys() != second.items.keys():
            raise EvaluationError(
                f"the two models were not scored on the same items of {first.task!r}",
                "evaluate both with the same limit on the same version of the task's data",
            )
        num_items += len(first.items)
        lost += sum(value > second.items[item] for item, value in first.items.items())
        gained += sum(value < second.items[item] for item, value in first.items.items())
    if not num_items:
        return None
    return Flips(num_items, wilson(lost, num_items, level=level), wilson(gained, num_items, level=level))
