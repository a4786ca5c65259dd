"""Shares of rows: their interval, whether one is surely too small, and whether two of the same rows differ."""

from __future__ import annotations

import math
from statistics import NormalDist

from sdft_ray.statistics.estimate import Interval, McNemar


def wilson(count: int, total: int, *, level: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927), which never leaves [0, 1] and is not empty at 0 or 1.

    All three values are None without rows.
    """
    if not total:
        return Interval(None, None, None, level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low = 0.0 if count == 0 else middle - reach
    high = 1.0 if count == total else middle + reach
    return Interval(share, low, high, level)


def is_surely_below(count: int, total: int, bound: float, error: float) -> bool:
    """Whether a share of at least `bound` would give `count` or fewer of `total` rows with a probability below `error`.

    The exact binomial tail (Clopper and Pearson 1934). For rows drawn without replacement it is too large, so that it
    errs to the safe side.
    """
    from scipy.special import bdtr

    return bool(total) and bool(bdtr(count, total, bound) < error)


def mcnemar_counts(only_first: int, only_second: int) -> McNemar:
    """The exact two-sided test that rows on which two differ are as likely one's as the other's (McNemar 1947).

    The p-value is 1 where they differ nowhere. The mid-p value counts half of what was seen (Fagerland et al. 2013).
    """
    from scipy.special import bdtr

    fewer, both = min(only_first, only_second), only_first + only_second
    tail = float(bdtr(fewer, both, 0.5))
    below = float(bdtr(fewer - 1, both, 0.5)) if fewer else 0.0
    mid_p = 1.0 if only_first == only_second else tail + below
    return McNemar(only_first, only_second, min(1.0, 2 * tail), mid_p)
