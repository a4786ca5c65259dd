"""The minimum detectable effect of an evaluation: the smallest true difference of two models that it will likely show.

Two models answer the same items. Only the items that exactly one of them gets right tell them apart; let d be their
share. With a true difference delta of accuracies, the difference of an item, -1, 0 or 1, has the variance d - delta^2,
and d where there is none, so that a two-sided test at level a has the power 1 - b at the delta that solves

    delta = z(1 - a / 2) sqrt(v(0)) + z(1 - b) sqrt(v(delta)),   v(delta) = sum_t (d - delta^2) / n_t / T^2

for the mean over T tasks with n_t items (for one task Connor 1987, Biometrics 43, on McNemar's test). Tasks are fixed;
the spread between training seeds comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

POWER, LEVEL = 0.8, 0.05
"""What is usual."""
ASSUMED_DISCORDANT = 0.2
"""The share of items that exactly one of two models gets right, where nothing was measured."""


def detectable_difference(
    num_items: Sequence[int], discordant: float, *, power: float = POWER, level: float = LEVEL
) -> float | None:
    """The difference of mean accuracies over tasks of `num_items` items, a share in (0, 1].

    `discordant` is the share of items that exactly one of the models gets right, in (0, 1]. None where even that share,
    all of it on one side, would not be seen: there are too few items.
    """
    normal = NormalDist()
    one, two = normal.inv_cdf(1 - level / 2), normal.inv_cdf(power)
    scale = math.sqrt(sum(1 / count for count in num_items)) / len(num_items)

    def lacks(delta: float) -> float:
        return scale * (one * math.sqrt(discordant) + two * math.sqrt(discordant - delta**2)) - delta

    low, high = 0.0, discordant
    if lacks(high) > 0:
        return None
    for _ in range(60):  # halved until it is exact
        middle = (low + high) / 2
        low, high = (middle, high) if lacks(middle) > 0 else (low, middle)
    return high
