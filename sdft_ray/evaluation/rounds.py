"""A figure measured in several rounds, and ratios of two figures by round. Imports neither torch nor numpy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """One figure over rounds: the median, the quartiles `low` and `high` around it, and every round in order."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


def over_rounds(values: Iterable[float]) -> Spread:
    """The spread of at least one value; quartiles are interpolated between the values themselves."""
    rounds = tuple(values)
    assert rounds, "a figure needs a round"
    if len(rounds) == 1:
        return Spread(rounds[0], rounds[0], rounds[0], rounds)
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Spread(median, low, high, rounds)


def ratio(above: Spread, below: Spread) -> Spread:
    """`above` over `below` within each round, so that a slower machine during a whole round cancels."""
    return over_rounds(one / other for one, other in zip(above.rounds, below.rounds, strict=True))
