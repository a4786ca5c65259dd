"""The standard interval of a paired difference, shown beside ours so that others can check and compare.

Two textbook methods on the differences d_i of the items of a task:

- the paired percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): items are
  resampled within their task, and the limits are quantiles of the resampled means;
- the standard error of the mean by the central limit theorem, with clustered items (Miller, "Adding Error Bars to
  Evals", arXiv:2411.00640, sections 2.2 and 4.2): items of one cluster, such as the questions on one passage, are not
  independent,

      stderr^2 = var(d) / n + (1 / n^2) sum over clusters c, i != j in c, of (d_i - mean)(d_j - mean).

Both are too narrow where the two models differ on only a few items; docs/statistics.md has the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdft_ray.statistics.estimate import Standard
from sdft_ray.statistics.paired import check_level, paired_scores
from sdft_ray.statistics.scores import Scores, TaskScore

Array = NDArray[np.float64]

_MAX_DISTINCT = 64
"""Up to here it is faster to draw how often each distinct value occurs than to draw the items."""
_MAX_NUMBERS = 1 << 21
"""Numbers in memory at once while drawing: 16 MiB."""


def standard_difference(
    first: Scores,
    second: Scores,
    *,
    tasks: Sequence[str] | None = None,
    cluster_of: Callable[[str, str], str] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Standard:
    """The mean of task means of `second` minus that of `first`; `tasks` as in `paired.paired_bootstrap`.

    `cluster_of` maps (task, item) to the item's cluster; without it every item is its own cluster. Tasks are fixed and
    independent. Raises `EvaluationError` as `paired_bootstrap` does.
    """
    check_level(level)
    pairs = paired_scores(first, second, tasks)
    random = np.random.default_rng(seed)
    drawn_N = np.zeros(draws)
    variances: list[float] = []
    values: list[float] = []
    for one, other in pairs:
        moves_I = np.array([other.items[item] - value for item, value in one.items.items()])
        values.append(float(moves_I.mean()))
        variances.append(_variance(moves_I, _clusters(one, cluster_of)))
        drawn_N += _resampled_means(moves_I, draws, random)
    low, high = np.quantile(drawn_N / len(pairs), [(1 - level) / 2, (1 + level) / 2])
    variance = sum(variances) / len(pairs) ** 2
    stderr = math.sqrt(variance) if math.isfinite(variance) else None
    return Standard(sum(values) / len(pairs), stderr, float(low), float(high), level)


def _clusters(score: TaskScore, cluster_of: Callable[[str, str], str] | None) -> NDArray[np.intp]:
    """The index of each item's cluster."""
    if cluster_of is None:
        return np.arange(len(score.items))
    return np.unique([cluster_of(score.task, item) for item in score.items], return_inverse=True)[1]


def _variance(moves_I: Array, cluster_I: NDArray[np.intp]) -> float:
    """Of the mean; nan with a single item. Sampling noise can make the formula negative: then it counts as 0."""
    num_items = len(moves_I)
    if num_items < 2:
        return math.nan
    residual_I = moves_I - moves_I.mean()
    within = float((np.bincount(cluster_I, residual_I) ** 2).sum() - (residual_I**2).sum())
    return max(0.0, float(moves_I.var(ddof=1)) / num_items + within / num_items**2)


def _resampled_means(moves_I: Array, draws: int, random: np.random.Generator) -> Array:
    """(N,) means of as many items as there are, drawn with replacement."""
    num_items = len(moves_I)
    value_C, count_C = np.unique(moves_I, return_counts=True)
    if len(value_C) <= _MAX_DISTINCT:
        return random.multinomial(num_items, count_C / num_items, size=draws) @ value_C / num_items
    mean_N = np.empty(draws)
    step = max(1, _MAX_NUMBERS // num_items)
    for begin in range(0, draws, step):
        size = min(step, draws - begin)
        mean_N[begin : begin + size] = random.choice(moves_I, size=(size, num_items)).mean(axis=1)
    return mean_N
