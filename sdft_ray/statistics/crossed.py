"""A mean over training seeds and test items, both random: crossed random effects.

Every seed's student answers the same items, so the values of a task are a table of S seeds by I items, one in each
cell: y_si = mean + seed_s + item_i + rest_si, all three random; the rest is what a seed does to an item, and luck.
Errors over seeds alone, or over items alone, leave the other out, and their sum counts the rest twice. By mean squares
(Searle, Casella and McCulloch, Variance Components, 1992, chapter 4; Brennan, Generalizability Theory, 2001, calls it
the p x i design)

    E[MS_items] = S var(item) + var(rest),   E[MS_rest] = var(rest),

which needs neither normal values nor equal variances, only seeds and items that could be exchanged. A seed moves all
tasks together, so its part is taken from the S means over all tasks, m_s, whose variance over seeds holds what is left
of the rest too. With T tasks, the mean of task means has the variance

    var(m_s) / S  +  sum_t (MS_items,t - MS_rest,t) / (S I_t T^2),

the second part, where it comes out negative, counted as 0. The first rests on a handful of seeds, the second on many
items. One Student t with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2) for the sum covers only
91-93 % where three seeds matter a lot. Howe's limits (1974, JASA 69) have a quantile for each part,

    half-width^2 = t(S - 1)^2 var(m_s) / S  +  t(df of items)^2 (the second part),

and cover up to 98 % where three seeds matter little, for what is left of the rest in the first part is known much
better, from all cells. With that taken out of it altogether, and given its own quantile, the coverage falls to 92 %
where seeds matter a lot. So (S - 2) / (S - 1) of it is: none of it with two seeds, nearly all with many. That was
chosen by simulation, and covers 93-97 % with three seeds and with five, and up to 98 % with two
(`jobs/bench/coverage.py`).

Where items matter little, MS_items barely exceeds MS_rest, and their difference, small as it is, has next to no degrees
of freedom: its limit has no bound. It is never taken beyond that of MS_items as a whole, of which it is a part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdft_ray.errors import EvaluationError

Array = NDArray[np.float64]

_ROUNDING = 1e-24
"""Variances up to here are those of equal values, rounded."""
_FEWEST = 0.1
"""Degrees of freedom below which no quantile is looked up: it exceeds 10^12 there."""


@dataclass(frozen=True)
class CrossedEstimate:
    """A mean of task means, its standard error, and confidence limits.

    `seed_stderr` is what other seeds on the same items would change, luck included, and None with a single seed;
    `item_stderr` is what other items would; the sum of their squares is that of `stderr`, and `df` says how well that
    is known (Satterthwaite). `low`, `high` and `df` are None where nothing varies, which does not tell how much it
    could. All are None where the figure is undefined.
    """

    value: float | None
    stderr: float | None
    low: float | None
    high: float | None
    seed_stderr: float | None
    item_stderr: float | None
    df: float | None


def crossed_mean(values: Mapping[str, Array], *, level: float = 0.95) -> CrossedEstimate:
    """The mean of task means. `values` maps a task to (S, I_t): seed s, the same for all tasks, on item i.

    A single seed leaves the spread between seeds out, which the missing `seed_stderr` says. Raises `EvaluationError`
    without tasks, for a task with fewer than two items, and where tasks have different numbers of seeds.
    """
    tables = _checked(values)
    num_seeds = len(tables[0])
    whole, rest = _item_parts(tables)
    items = _less(whole, rest)
    seeds = _seed_part(tables) if num_seeds > 1 else _NONE
    variance = items.variance + seeds.variance
    value = float(np.mean([table_SI.mean() for table_SI in tables]))
    low = high = df = None
    if variance > _ROUNDING:
        known = (num_seeds - 2) / (num_seeds - 1) * rest.variance if num_seeds > 1 else 0.0
        parts = [replace(rest, variance=known), replace(seeds, variance=max(0.0, seeds.variance - known))]
        square = min(_square(items, level), _square(whole, level)) + sum(_square(part, level) for part in parts)
        low, high = value - math.sqrt(square), value + math.sqrt(square)
        df = variance**2 / sum(part.spread for part in (items, rest, seeds))
    return CrossedEstimate(
        value=value,
        stderr=math.sqrt(variance),
        low=low,
        high=high,
        seed_stderr=math.sqrt(seeds.variance) if num_seeds > 1 else None,
        item_stderr=math.sqrt(items.variance),
        df=df,
    )


def crossed_difference(
    first: Mapping[str, Array], second: Mapping[str, Array], *, level: float = 0.95
) -> CrossedEstimate:
    """`second` less `first`: two arms trained with the same seeds and scored on the same items, paired on both.

    Row s and column i of both belong to the same seed and item. Raises `EvaluationError` as `crossed_mean`, and where
    tasks or shapes differ.
    """
    _check_same(first, second, axes=(0, 1))
    moves = {task: np.asarray(second[task], float) - np.asarray(table, float) for task, table in first.items()}
    return crossed_mean(moves, level=level)


def crossed_recovery(
    students: Mapping[str, Array], teacher: Mapping[str, Array], *, level: float = 0.95
) -> CrossedEstimate:
    """The students' mean over the teacher's mean, r, both of task means. `teacher` maps a task to (I_t,).

    Linearised, the delta method of `recovery`: cell (s, i) moves r by (student_si - r teacher_i) / mean(teacher), and
    the error of r is that of the mean of these. For a chance-corrected recovery take off what guessing scores
    beforehand, from both. All is None where the teacher's mean is not above 0. Raises as `crossed_difference`.
    """
    _check_same(students, teacher, axes=(-1,))
    mean = float(np.mean([np.mean(item_I) for item_I in teacher.values()])) if teacher else 0.0
    if not mean > 0:
        return CrossedEstimate(None, None, None, None, None, None, None)
    ratio = float(np.mean([np.mean(table_SI) for table_SI in students.values()])) / mean
    moves = {task: (np.asarray(table, float) - ratio * teacher[task]) / mean for task, table in students.items()}
    found = crossed_mean(moves, level=level)
    low, high = (None if end is None else ratio + end for end in (found.low, found.high))
    return replace(found, value=ratio, low=low, high=high)


@dataclass(frozen=True)
class _Part:
    """A part of the variance of the mean, and Satterthwaite's degrees of freedom of what it was estimated by.

    `spread` is the sum, over the mean squares in it, of (its share of the variance)^2 / its degrees of freedom.
    """

    variance: float
    df: float
    spread: float


_NONE = _Part(0.0, math.inf, 0.0)


def _seed_part(tables: list[Array]) -> _Part:
    num_seeds = len(tables[0])
    mean_S = np.mean([table_SI.mean(axis=1) for table_SI in tables], axis=0)
    variance = float(mean_S.var(ddof=1)) / num_seeds
    return _Part(variance, num_seeds - 1, variance**2 / (num_seeds - 1))


def _item_parts(tables: list[Array]) -> tuple[_Part, _Part]:
    """What the items contribute with what is left of the rest, and that alone: nothing that one seed could tell."""
    items, rest = [], []
    for table_SI in tables:
        num_seeds, num_items = table_SI.shape
        scale = num_seeds * num_items * len(tables) ** 2
        item_I, seed_S1 = table_SI.mean(axis=0), table_SI.mean(axis=1, keepdims=True)
        items.append((num_seeds * float(item_I.var(ddof=1)) / scale, num_items - 1))
        if num_seeds > 1:
            rest_df = (num_seeds - 1) * (num_items - 1)
            square = float(((table_SI - item_I - seed_S1 + table_SI.mean()) ** 2).sum()) / rest_df
            rest.append((square / scale, rest_df))
    return _sum(items), _sum(rest)


def _less(whole: _Part, rest: _Part) -> _Part:
    spread = whole.spread + rest.spread
    variance = max(0.0, whole.variance - rest.variance)
    return _Part(variance, variance**2 / spread if spread > 0 else math.inf, whole.spread)


def _sum(squares: list[tuple[float, int]]) -> _Part:
    """Of mean squares and their degrees of freedom."""
    variance, spread = sum(part for part, _ in squares), sum(part**2 / df for part, df in squares)
    return _Part(variance, variance**2 / spread if spread > 0 else math.inf, spread)


def _checked(values: Mapping[str, Array]) -> list[Array]:
    if not values:
        raise EvaluationError("there is no task to take a mean over", "give the values of at least one task")
    tables = {task: np.asarray(table, float) for task, table in values.items()}
    for task, table in tables.items():
        if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
            raise EvaluationError(
                f"the values of {task!r} are of shape {table.shape}", "give one row per seed, with at least two items"
            )
    num_seeds = {task: len(table) for task, table in tables.items()}
    if len(set(num_seeds.values())) > 1:
        fewest, most = (
            min(num_seeds, key=lambda task: num_seeds[task]),
            max(num_seeds, key=lambda task: num_seeds[task]),
        )
        raise EvaluationError(
            f"{most!r} has {num_seeds[most]} seeds and {fewest!r} has {num_seeds[fewest]}",
            "score the students of all seeds on all tasks",
        )
    return list(tables.values())


def _check_same(first: Mapping[str, Array], second: Mapping[str, Array], *, axes: tuple[int, ...]) -> None:
    """Raise `EvaluationError` unless both have the same tasks and, on the axes named, the same lengths."""
    stray = first.keys() ^ second.keys()
    if stray:
        raise EvaluationError(f"only one side was scored on {min(stray)!r}", "evaluate both on the same tasks")
    for task, table in first.items():
        shapes = np.shape(table), np.shape(second[task])
        if [shapes[0][axis : axis + 1 or None] for axis in axes] != [
            shapes[1][axis : axis + 1 or None] for axis in axes
        ]:
            raise EvaluationError(
                f"the values of {task!r} are of shapes {shapes[0]} and {shapes[1]}",
                "evaluate both with the same seeds on the same items",
            )


def _square(part: _Part, level: float) -> float:
    """The part of the squared half-width: Student's quantile squared times the variance."""
    from scipy.special import stdtrit

    return float(stdtrit(max(part.df, _FEWEST), (1 + level) / 2)) ** 2 * part.variance
