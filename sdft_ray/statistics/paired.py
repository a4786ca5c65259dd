"""Two models on the same items: intervals of differences and of recovery by a paired bootstrap, and McNemar's test.

Items are random, tasks are fixed. Items are resampled within their task, the same ones for both models, so that what
makes an item hard for both cancels. The spread between training seeds is not included; see `crossed`.

Two models often disagree on a handful of items. Where that is 2.5 to 10 of 200 in expectation, the coverage of 95 %
percentile intervals falls to 81 %, of BCa to 82 % and of bootstrap-t to 79 %, and two models that agree on everything
get an interval of length zero. The intervals here cover 93.4 to 98.9 %, and more than 96 % where still fewer items
differ (all 2 x 2 tables enumerated; other worlds are in `jobs/bench/coverage.py`), by two changes:

- Smoothing. Items are drawn from those observed and, with half an item's weight each, one that only the first model
  answers correctly and one that only the second does. Bonett and Price (2012, J. Educ. Behav. Stat. 37) add a whole one
  to the cells of the 2 x 2 table. With T tasks the half is shared out: task t with n_t items gets a share
  proportional to n_t^-2, as its items enter the variance of the mean of task means.
- Tilting (Efron 1981, Can. J. Stat. 9; DiCiccio and Romano 1990, Int. Stat. Rev. 58). A limit is the largest or
  smallest value that a test would not reject: the weights of the items are tilted by exp(tau u), u the influence of an
  item on the figure, until what was observed lies at the edge of what would be drawn. Draws are made once, from the
  untilted weights, and weighed by their likelihood ratio, which depends on the sum of their u alone. Draws equal to the
  observed value count half on either side (mid-p), as differences of 0/1 items have many ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.estimate import Interval, McNemar
from sdft_ray.statistics.scores import Scores, TaskScore
from sdft_ray.statistics.shares import mcnemar_counts

Array = NDArray[np.float64]

_PSEUDO_ITEMS = 0.5
"""The weight, in items, of each of the two unobserved items."""
_NUMBERS_AT_ONCE = 1 << 21
"""Numbers in memory at once while drawing: 16 MiB."""
_FEW_CELLS = 64
"""Up to here it is faster to draw how many items have each pair of values than to draw the items."""
_FURTHEST_TILT = 32.0
"""In standard errors of the figure, beyond which the tilted weights lie at one end."""


def check_comparable(first: Scores, second: Scores) -> None:
    """Raise `EvaluationError` if the two were scored by different versions of lm-eval. Unknown versions pass."""
    if first.harness and second.harness and first.harness != second.harness:
        raise EvaluationError(
            "results of different harness versions cannot be compared: "
            f"one is of lm-eval {first.harness}, the other of {second.harness}",
            "evaluate both models with the same version of lm-eval",
        )


def check_level(level: float) -> None:
    """Raise `EvaluationError` for a confidence level outside [0.5, 1)."""
    if not 0.5 <= level < 1:
        raise EvaluationError(
            f"the confidence level of an interval is {level:g}", "choose one from 0.5 to below 1, such as 0.95"
        )


def has_item_values(*scores: TaskScore) -> bool:
    """Whether each score is the mean of its values per item. Others, such as corpus metrics, cannot be resampled."""
    return all(
        score.items and math.isclose(math.fsum(score.items.values()) / len(score.items), score.value, abs_tol=1e-6)
        for score in scores
    )


def paired_bootstrap(
    first: Scores,
    second: Scores,
    *,
    tasks: Sequence[str] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of task means of `second` less that of `first`. `tasks` are all where higher is better, unless named.

    Raises `EvaluationError` where the two were not scored in the same way on the same items, where a score is not the
    mean of its items, and for a `level` outside [0.5, 1).
    """
    pool = _pool(paired_scores(first, second, tasks))
    value = _difference(pool, pool.count_C)
    influence_C = pool.second_C - pool.first_C
    low, high = _limits(pool, influence_C, _difference, draws=draws, level=level, seed=seed)
    return Interval(value, low, high, level)


def recovery_interval(
    teacher: Scores,
    student: Scores,
    *,
    tasks: Sequence[str] | None = None,
    chance_corrected: bool = False,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The student's mean of task means over the teacher's, as `recovery` defines it.

    With `chance_corrected` what guessing scores is taken off every item, and tasks of unknown chance are left out
    (refused where they are named). There is no value where the teacher's mean is not above 0, and there are no limits
    where 0 is within the normal interval of that mean: the ratio may then be anything. Raises as `paired_bootstrap`.
    """
    pairs = paired_scores(teacher, student, tasks)
    if chance_corrected:
        unknown = [pair[0].task for pair in pairs if pair[0].chance is None]
        if tasks is not None and unknown:
            raise EvaluationError(f"the score of random guessing on {unknown[0]!r} is not known", "leave that task out")
        pairs = [pair for pair in pairs if pair[0].chance is not None]
        if not pairs:
            return Interval(None, None, None, level)
    pool = _pool(pairs, chance_corrected=chance_corrected)
    mean = _mean(pool, pool.count_C, pool.first_C)
    if mean <= 0:
        return Interval(None, None, None, level)
    value = _ratio(pool, pool.count_C)
    if mean <= NormalDist().inv_cdf((1 + level) / 2) * _stderr_first(pool):
        return Interval(value, None, None, level)
    influence_C = (pool.second_C - value * pool.first_C) / mean
    low, high = _limits(pool, influence_C, _ratio, draws=draws, level=level, seed=seed)
    return Interval(value, low, high, level)


def mcnemar(first: TaskScore, second: TaskScore) -> McNemar:
    """The exact two-sided test that either model is as likely to be the only one that is right (McNemar 1947).

    Items on which both are right or both wrong say nothing; of the others, the number that only the first answers
    rightly is binomial with 1/2. Raises `EvaluationError` where items differ or a value is neither 0 nor 1.
    """
    _check_items(first, second)
    if {*first.items.values(), *second.items.values()} - {0.0, 1.0}:
        raise EvaluationError(
            f"items of {first.task!r} are not just right or wrong", "compare them with paired_bootstrap instead"
        )
    only_first = sum(value > second.items[item] for item, value in first.items.items())
    only_second = sum(value < second.items[item] for item, value in first.items.items())
    return mcnemar_counts(only_first, only_second)


# --- pairs of values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """C distinct pairs of values, task after task, and how many of the task's items have each.

    The last two pairs of a task are the unobserved ones, with count 0. `weight_C` is the mass that an item of the
    task has in the mean of task means; `smooth_C` the probability to draw a pair, 1 in all within its task.
    """

    first_C: Array
    second_C: Array
    count_C: Array
    smooth_C: Array
    weight_C: Array
    starts_T: NDArray[np.intp]
    num_items_T: NDArray[np.int64]


def paired_scores(first: Scores, second: Scores, tasks: Sequence[str] | None) -> list[tuple[TaskScore, TaskScore]]:
    """Both scores of every task asked for. Raises `EvaluationError` where they cannot be compared."""
    check_comparable(first, second)
    asked = first.tasks.keys() | second.tasks.keys() if tasks is None else set(tasks)
    stray = asked - (first.tasks.keys() & second.tasks.keys())
    if stray:
        raise EvaluationError(
            f"the two models were not both scored on {min(stray)!r}", "evaluate both on the same tasks"
        )
    names = tasks
    if names is None:
        names = [
            name for name, one in first.tasks.items() if one.not_averaged is second.tasks[name].not_averaged is None
        ]
    if not names:
        raise EvaluationError("there is no task to compare the two models on", "evaluate both on the same tasks")
    pairs = [(first.tasks[name], second.tasks[name]) for name in names]
    for one, other in pairs:
        _check_items(one, other)
        if not has_item_values(one, other):
            raise EvaluationError(
                f"the score of {one.task!r} is not the mean of its items", "leave that task out of the comparison"
            )
    return pairs


def _check_items(first: TaskScore, second: TaskScore) -> None:
    if (first.metric, first.filter, first.num_fewshot) != (second.metric, second.filter, second.num_fewshot):
        raise EvaluationError(
            f"the two models were scored with different settings on {first.task!r}",
            "evaluate both with the same settings",
        )
    if not first.items or first.items.keys() != second.items.keys():
        raise EvaluationError(
            f"the two models have no common set of items on {first.task!r}: {len(first.items):,} and "
            f"{len(second.items):,}, {len(first.items.keys() & second.items.keys()):,} in common",
            "evaluate both with the same limit on the same version of the task's data",
        )


def _pool(pairs: Sequence[tuple[TaskScore, TaskScore]], *, chance_corrected: bool = False) -> _Pool:
    num_items_T = np.array([len(first.items) for first, _ in pairs])
    # Float before the square: 14,000 items to the fourth power would not fit.
    share_T = num_items_T.astype(float) ** -2
    pseudo_T = _PSEUDO_ITEMS * share_T / share_T.sum()
    values, counts, smooth = [], [], []
    for (first, second), pseudo in zip(pairs, pseudo_T, strict=True):
        items_I2 = np.array([(value, second.items[item]) for item, value in first.items.items()])
        # Complex numbers sort by pairs, much faster than rows do.
        seen_C, count_C = np.unique(items_I2[:, 0] + 1j * items_I2[:, 1], return_counts=True)
        low, high = min(0.0, items_I2.min()), max(1.0, items_I2.max())
        chance = (first.chance or 0.0) if chance_corrected else 0.0
        values.append(np.concatenate([seen_C, [high + 1j * low, low + 1j * high]]) - chance * (1 + 1j))
        counts.append(np.concatenate([count_C, [0, 0]]))
        smooth.append(np.concatenate([count_C, [pseudo, pseudo]]) / (len(items_I2) + 2 * pseudo))
    cells_T = [len(count) for count in counts]
    values_C = np.concatenate(values)
    return _Pool(
        first_C=np.real(values_C),
        second_C=np.imag(values_C),
        count_C=np.concatenate(counts).astype(float),
        smooth_C=np.concatenate(smooth),
        weight_C=np.repeat(1 / (len(pairs) * num_items_T), cells_T),
        starts_T=np.concatenate([[0], np.cumsum(cells_T)[:-1]]),
        num_items_T=num_items_T,
    )


def _mean(pool: _Pool, mass_C: Array, value_C: Array) -> float:
    """The mean over tasks of the means of a value, with any mass on the pairs of a task."""
    total_T = np.add.reduceat(mass_C * value_C, pool.starts_T)
    return float((total_T / np.add.reduceat(mass_C, pool.starts_T)).mean())


def _difference(pool: _Pool, mass_C: Array) -> float:
    return _mean(pool, mass_C, pool.second_C - pool.first_C)


def _ratio(pool: _Pool, mass_C: Array) -> float:
    return _mean(pool, mass_C, pool.second_C) / _mean(pool, mass_C, pool.first_C)


def _stderr_first(pool: _Pool) -> float:
    """Of the first model's mean of task means, with the items that nobody saw."""
    mean_T = np.add.reduceat(pool.smooth_C * pool.first_C, pool.starts_T)
    square_T = np.add.reduceat(pool.smooth_C * pool.first_C**2, pool.starts_T)
    return math.sqrt(float(((square_T - mean_T**2) / pool.num_items_T).sum())) / len(mean_T)


# --- drawing and tilting ------------------------------------------------------------------------------------


def _limits(
    pool: _Pool,
    influence_C: Array,
    figure: Callable[[_Pool, Array], float],
    *,
    draws: int,
    level: float,
    seed: int,
) -> tuple[float, float]:
    """Both limits of a figure; `influence_C` is by how much an item with each pair moves it, per unit of mass."""
    from scipy.optimize import brentq

    check_level(level)
    moves_C = pool.weight_C * influence_C
    drawn_N = _draw(pool, moves_C, draws, np.random.default_rng(seed))
    value, observed = figure(pool, pool.count_C), float(pool.count_C @ moves_C)
    unit = float(drawn_N.std()) or 1.0  # a standard error; where nothing moves any unit will do
    same_N = np.isclose(drawn_N, observed, rtol=0, atol=1e-9 * unit)
    log_smooth_C, cells_T = np.log(pool.smooth_C), np.diff([*pool.starts_T, len(moves_C)])

    def tilted(tilt: float) -> tuple[Array, Array]:
        """Unnormalised log-probabilities of the pairs, and of each task the logarithm of their sum."""
        log_C = log_smooth_C + tilt / unit * moves_C
        return log_C, np.logaddexp.reduceat(log_C, pool.starts_T)

    def limit(sign: int) -> float:
        """The low one for -1: tilted down until the observed, or more, has a chance of only (1 - level) / 2."""
        as_far_N = np.where(same_N, 0.5, sign * (observed - drawn_N) > 0)

        def excess(tilt: float) -> float:
            ratio_N = np.exp(tilt / unit * drawn_N - pool.num_items_T @ tilted(tilt)[1])
            return float((as_far_N * ratio_N).mean()) - (1 - level) / 2

        near, far = 0.0, float(sign)
        while excess(far) > 0 and abs(far) < _FURTHEST_TILT:
            near, far = far, 2 * far
        root: Any = far if excess(far) > 0 else brentq(excess, near, far, xtol=1e-4)
        log_C, norm_T = tilted(root)
        return figure(pool, np.exp(log_C - np.repeat(norm_T, cells_T)))

    return min(value, limit(-1)), max(value, limit(1))


def _draw(pool: _Pool, moves_C: Array, draws: int, random: np.random.Generator) -> Array:
    """(N,) sums of moves over as many items as each task has, drawn with replacement from the smoothed weights."""
    drawn_N = np.zeros(draws)
    ends = [*pool.starts_T[1:], len(moves_C)]
    for start, end, num_items in zip(pool.starts_T, ends, pool.num_items_T, strict=True):
        few = end - start <= _FEW_CELLS
        step = max(1, _NUMBERS_AT_ONCE // int(end - start if few else num_items))
        for begin in range(0, draws, step):
            size = min(step, draws - begin)
            smooth_C, cell_moves_C = pool.smooth_C[start:end], moves_C[start:end]
            if few:
                sums_N = random.multinomial(num_items, smooth_C, size=size) @ cell_moves_C
            else:
                sums_N = random.choice(cell_moves_C, size=(size, num_items), p=smooth_C).sum(axis=1)
            drawn_N[begin : begin + size] += sums_N
    return drawn_N
