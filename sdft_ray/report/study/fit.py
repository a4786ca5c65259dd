"""Recovery of students by group of tasks, and the curve of one arm over data-set sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from sdft_ray.report.study.model import Fit, LinePoint, MoreRows
from sdft_ray.statistics.crossed import Array, CrossedEstimate, crossed_difference
from sdft_ray.statistics.curve import Curve, NotFitted, Point, Reading, extrapolate, fit_curve
from sdft_ray.statistics.estimate import Estimate

FACTORS = (2.0, 4.0, 10.0)
"""Multiples of the largest size for which a gain is predicted."""
NUM_SEEN, NUM_AHEAD = 33, 9
"""Points of a drawn curve between the sizes, and one doubling beyond them."""
LEAST_EIGENVALUE = 0.02
"""Of the correlations between sizes. They are estimated pair by pair, so that together they can be impossible."""


def recovery_moves(students: Mapping[str, Array], teacher: Mapping[str, Array]) -> dict[str, Array]:
    """What each student's value on each item says of recovery r, linearised: r + (student - r teacher) / mean(teacher).

    Their mean of task means is r, and their errors are those of `crossed_recovery`. Differences of two of them are
    differences of recoveries, in which the teacher is a ratio's denominator and no constant.
    """
    mean = float(np.mean([item_I.mean() for item_I in teacher.values()]))
    ratio = float(np.mean([table_SI.mean() for table_SI in students.values()])) / mean
    return {task: ratio + (table_SI - ratio * teacher[task]) / mean for task, table_SI in students.items()}


def fit_arm(sizes: Sequence[int], recoveries: Sequence[CrossedEstimate], moves: Sequence[Mapping[str, Array]]) -> Fit:
    """The curve through one arm's recoveries at K ascending sizes > 0, or why there is none."""
    for num_rows, crossed in zip(sizes, recoveries, strict=True):
        if not crossed.stderr:
            return Fit("few", f"no curve: at {num_rows:,} rows nothing varies, so the error there is unknown")
    errors_KK = covariance(recoveries, moves) if recoveries else np.zeros((0, 0))
    points = [
        Point(num_rows, crossed.value or 0.0, math.sqrt(errors_KK[k, k]))
        for k, (num_rows, crossed) in enumerate(zip(sizes, recoveries, strict=True))
    ]
    curve = fit_curve(points, errors_KK)
    if isinstance(curve, NotFitted):
        return Fit(curve.kind, curve.reason, change=_estimate(curve.change))
    more = zip(FACTORS, extrapolate(curve, curve.largest, FACTORS), strict=True)
    return Fit(
        "rising" if curve.asymptote is None else "curve",
        curve.note,
        _line(curve),
        _estimate(curve.asymptote),
        tuple(MoreRows(factor, w.num_rows, _estimate(w.score), _estimate(w.gain), w.reason) for factor, w in more),
    )


def covariance(recoveries: Sequence[CrossedEstimate], moves: Sequence[Mapping[str, Array]]) -> np.ndarray:
    """Of the errors of K sizes, (K, K): their students answer the same items, while every training is its own.

    What items do to two sizes together follows from var(a - b) = var(a) + var(b) - 2 cov(a, b), whose left side is the
    part of `crossed_difference` that items make. The spread between seeds is that of all sizes together: with a few
    seeds each, weights of their own would mostly follow chance.
    """
    item_K = np.array([crossed.item_stderr or 0.0 for crossed in recoveries]) ** 2
    seed_variance = float(np.mean([(crossed.seed_stderr or 0.0) ** 2 for crossed in recoveries]))
    covariance_KK = np.diag(item_K + seed_variance)
    for k, other in combinations(range(len(recoveries)), 2):
        apart = crossed_difference(moves[k], moves[other]).item_stderr or 0.0
        covariance_KK[k, other] = covariance_KK[other, k] = (item_K[k] + item_K[other] - apart**2) / 2
    stderr_K = np.sqrt(np.diag(covariance_KK))
    values_K, vectors_KK = np.linalg.eigh(covariance_KK / np.outer(stderr_K, stderr_K))
    possible_KK = (vectors_KK * np.maximum(values_K, LEAST_EIGENVALUE)) @ vectors_KK.T
    stderr_K /= np.sqrt(np.diag(possible_KK))
    return possible_KK * np.outer(stderr_K, stderr_K)


def _line(curve: Curve) -> tuple[LinePoint, ...]:
    seen = np.geomspace(curve.smallest, curve.largest, NUM_SEEN)[:-1]
    ahead = np.geomspace(curve.largest, 2 * curve.largest, NUM_AHEAD)
    ahead[0], ahead[-1] = curve.largest, 2 * curve.largest
    return tuple(LinePoint(float(n), *curve.predict(max(float(n), curve.smallest))) for n in (*seen, *ahead))


def _estimate(reading: Reading | None) -> Estimate | None:
    return None if reading is None else Estimate(reading.value, low=reading.low, high=reading.high, method="curve")
