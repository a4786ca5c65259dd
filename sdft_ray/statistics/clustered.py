"""A quantile of values that come in clusters, such as tokens in rows: the clusters are what was drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdft_ray.statistics.estimate import Interval


def clustered_quantile(
    clusters: Sequence[Sequence[float]], share: float, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The smallest value that at least `share` of all values do not exceed, with percentile limits of a bootstrap that
    draws whole clusters (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

    No limits with a single cluster. There is at least one value.
    """
    values_N = np.concatenate([np.asarray(part, float) for part in clusters])
    cluster_N = np.repeat(np.arange(len(clusters)), [len(part) for part in clusters])
    order_N = np.argsort(values_N, kind="stable")
    values_N, cluster_N = values_N[order_N], cluster_N[order_N]

    def quantile(times_C: np.ndarray) -> float:
        below_N = np.cumsum(times_C[cluster_N])
        # Without the margin a share such as 0.99 of 100 is reached one value too late, by rounding.
        return float(values_N[np.searchsorted(below_N, share * below_N[-1] - 1e-9)])

    value = quantile(np.ones(len(clusters)))
    if len(clusters) < 2:
        return Interval(value, None, None, level)
    random = np.random.default_rng(seed)
    filled = np.flatnonzero([len(part) > 0 for part in clusters])
    drawn = []
    for _ in range(draws):
        times_C = np.zeros(len(clusters))
        np.add.at(times_C, random.choice(filled, size=len(filled)), 1.0)
        drawn.append(quantile(times_C))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)
