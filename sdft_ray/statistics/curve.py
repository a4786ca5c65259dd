"""What more training data buys: a learning curve fitted to scores at several data-set sizes.

The curve is the inverse power law y(n) = c - a n^-b, with a >= 0 and b in `B_RANGE`: its ceiling c is what endless data
would reach. It is the usual shape of learning curves (Hestness et al., arXiv:1712.00409; reviewed by Viering and Loog,
arXiv:2103.10948, who also show that no shape holds everywhere), it was found for the fine-tuning of language models
(Zhang et al., arXiv:2402.17193), and weighted least squares on it predict what further rows bring (Figueroa et al., BMC
Medical Informatics and Decision Making 12:8, 2012).

For a fixed b the curve is linear in c and a, so both are solved for exactly and only b is searched (variable
projection: Golub and Pereyra, SIAM Journal on Numerical Analysis 10, 1973). With errors of covariance V = L L' all
vectors are multiplied by L^-1 first; e_b, the unit vector along the part of -n^-b that is orthogonal to the constant,
then lowers chi-square by max(0, e_b . y)^2. That the constant is not enough is tested against the same greatest
reduction in noise around a constant, because b has no meaning there and no chi-square table holds (Davies, Biometrika
74, 1987).

Intervals are percentiles of a parametric bootstrap: points are drawn around the fitted curve with their errors and
fitted again. They speak of the curve, not of one further student, and only as far as the shape holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from sdft_ray.errors import EvaluationError

B_RANGE = (0.02, 2.0)
"""Exponents that are tried. At 0.02 a curve over any measured range is hardly told from one that rises with log n."""
MIN_SIZES = 4
"""Three parameters and one size to contradict them."""
REACH = 10.0
"""No prediction lies beyond this many times the largest size."""
REACH_RISING = 2.0
"""The same where no ceiling is in sight."""
OPEN = 2.0
"""A ceiling that may be this many times as far off as the curve has come is not in sight."""
SIGNIFICANCE = 0.025
"""Of the test for a rise and of the one for a fall, together 0.05."""
NUM_DRAWS = 2000
_GRID_B = np.geomspace(*B_RANGE, 121)


class Point(NamedTuple):
    """One data-set size: rows (> 0), the mean score, and its standard error (> 0)."""

    num_rows: int
    mean: float
    stderr: float


class Reading(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Extrapolation(NamedTuple):
    """What `num_rows` rows would bring: the score there and the gain; None, with a `reason`, out of reach."""

    num_rows: int
    score: Reading | None
    gain: Reading | None
    reason: str = ""


@dataclass(frozen=True)
class NotFitted:
    """Why no curve was fitted.

    `change` is what a straight line in log n rises by from the smallest size to the largest, None with fewer than two.
    """

    kind: Literal["few", "flat", "falling"]
    reason: str
    change: Reading | None = None


@dataclass(frozen=True)
class Curve:
    """y(n) = c - a n^-b between `smallest` and `largest` rows, and up to `reach` times the largest.

    `asymptote` is c with its interval, None where growth without end fits as well (b at its lowest costs less than
    1.96^2 in chi-square), or where the interval's upper end lies further above the largest size than `OPEN` times what
    was gained over all sizes. `note` says so, and whether the points scatter more than their errors allow, by the
    factor `widened` >= 1 that all errors were then multiplied by.
    `draws_R3` holds c, a, b of every draw of the bootstrap.
    """

    c: float
    a: float
    b: float
    asymptote: Reading | None
    smallest: int
    largest: int
    chi_square: float
    num_sizes: int
    widened: float
    note: str
    draws_R3: np.ndarray = field(repr=False, compare=False)

    @property
    def reach(self) -> float:
        return REACH if self.asymptote is not None else REACH_RISING

    def predict(self, num_rows: float) -> Reading:
        """The curve at `num_rows`. Raises `EvaluationError` below the smallest size and beyond reach."""
        self._check(num_rows)
        return _reading(_at(np.array([self.c, self.a, self.b]), num_rows), _at(self.draws_R3, num_rows))

    def gain(self, num_from: float, num_to: float) -> Reading:
        """y(num_to) - y(num_from), never below 0. Raises as `predict` does."""
        self._check(num_from)
        self._check(num_to)
        best = np.array([self.c, self.a, self.b])
        return _reading(
            _at(best, num_to) - _at(best, num_from), _at(self.draws_R3, num_to) - _at(self.draws_R3, num_from)
        )

    def _check(self, num_rows: float) -> None:
        furthest = self.reach * self.largest
        if not self.smallest <= num_rows <= furthest:
            raise EvaluationError(
                f"a curve fitted to {self.smallest:,} to {self.largest:,} rows predicts nothing at {num_rows:,.0f}",
                f"choose at most {furthest:,.0f} rows, or train on more rows",
            )


def extrapolate(curve: Curve, largest: int, factors: Sequence[float] = (2, 4, 10)) -> tuple[Extrapolation, ...]:
    """What multiples of `largest` rows would bring beyond `largest`; a reason in place of figures out of reach."""
    found = []
    for factor in factors:
        num_rows = round(factor * largest)
        if num_rows <= curve.reach * curve.largest:
            found.append(Extrapolation(num_rows, curve.predict(num_rows), curve.gain(largest, num_rows)))
            continue
        reason = (
            f"more than {REACH:g} times the largest size"
            if curve.asymptote is not None
            else "no ceiling in sight, so one doubling at most is predicted"
        )
        found.append(Extrapolation(num_rows, None, None, reason))
    return tuple(found)


def fit_curve(points: Sequence[Point], covariance_KK: np.ndarray | None = None) -> Curve | NotFitted:
    """Fit the curve to the K points of one arm, or say why they determine none.

    `covariance_KK`, if given, takes the place of the squared standard errors: students that answer the same items
    err together. Raises `EvaluationError` for rows or errors that are not positive and finite.
    """
    _check_points(points)
    sizes = sorted({point.num_rows for point in points})
    n_K = np.array([point.num_rows for point in points], dtype=float)
    y_K = np.array([point.mean for point in points])
    if covariance_KK is None:
        covariance_KK = np.diag([point.stderr**2 for point in points])
    if len(sizes) < MIN_SIZES:
        change = _change(n_K, y_K, covariance_KK) if len(sizes) > 1 else None
        return NotFitted("few", f"a curve needs {MIN_SIZES} sizes, and there are {len(sizes)}", change)
    plain = _Whitened(n_K, covariance_KK)
    # A curve that falls is one that rises upside down: a clear fall is no misfit.
    chi_square = min(plain.fit(y_K).chi_square, plain.fit(-y_K).chi_square)
    widened = _widened(chi_square, len(points) - 3)
    space = _Whitened(n_K, covariance_KK * widened**2)
    fit = space.fit(y_K)
    reason = _no_curve(space, y_K, widened)
    if reason is not None:
        return NotFitted(*reason, _change(n_K, y_K, covariance_KK * widened**2))
    fitted_K = fit.c - fit.a * n_K**-fit.b
    draws_R3 = space.fit_all(fitted_K + _noise(len(points)) @ space.factor_KK.T)
    asymptote = _reading(fit.c, draws_R3[:, 0])
    gained = fitted_K.max() - fitted_K.min()
    endless = space.chi_square(y_K, B_RANGE[0]) - fit.chi_square < 1.96**2
    notes = []
    if endless or asymptote.high - fitted_K.max() > OPEN * gained:
        asymptote = None
        notes.append("no ceiling in sight: a curve that rises far beyond fits as well, so the asymptote is open")
    if widened > 1:
        notes.append(f"the points scatter {widened:.1f} times as far as their errors, which were widened by that much")
    return Curve(
        fit.c, fit.a, fit.b, asymptote, sizes[0], sizes[-1],
        chi_square, len(sizes), widened, "; ".join(notes), draws_R3,
    )  # fmt: skip


def _check_points(points: Sequence[Point]) -> None:
    for point in points:
        if not (point.num_rows > 0 and math.isfinite(point.mean) and 0 < point.stderr < math.inf):
            raise EvaluationError(
                f"{point} cannot be a point of a curve", "give rows and standard errors that are positive and finite"
            )


class _Fit(NamedTuple):
    c: float
    a: float
    b: float
    chi_square: float


class _Whitened:
    """The points' sizes in units of their errors, where least squares need no weights."""

    def __init__(self, n_K: np.ndarray, covariance_KK: np.ndarray) -> None:
        self.factor_KK = np.linalg.cholesky(covariance_KK)
        # Sizes relative to their geometric mean keep n^-b near 1; `a` is scaled back at the end.
        self._middle = float(np.exp(np.log(n_K).mean()))
        self._relative_K = n_K / self._middle
        self._one_K = self._solve(np.ones_like(n_K))
        self._one_square = float(self._one_K @ self._one_K)
        self.directions_GK, self._powers_GK, self._lengths_G = self._directions(_GRID_B)

    def fit(self, y_K: np.ndarray) -> _Fit:
        """Search every local minimum over the grid of b, each to its bottom, and take the lowest."""
        from scipy.optimize import minimize_scalar

        chi_G = self._constant(y_K) - np.maximum(0.0, self.rises(y_K[None])[0]) ** 2
        padded = np.pad(chi_G, 1, constant_values=np.inf)
        starts = np.flatnonzero((chi_G < padded[:-2]) & (chi_G <= padded[2:]))
        best = (float(chi_G.min()), float(_GRID_B[chi_G.argmin()]))
        for start in starts:
            span = (math.log(_GRID_B[max(start - 1, 0)]), math.log(_GRID_B[min(start + 1, len(_GRID_B) - 1)]))
            found: Any = minimize_scalar(
                lambda log_b: self.chi_square(y_K, math.exp(log_b)), bounds=span, method="bounded"
            )
            best = min(best, (float(found.fun), math.exp(found.x)))
        c, a = self._solved(y_K[None], *self._directions(np.array([best[1]])))
        return _Fit(float(c[0]), float(a[0]) * self._middle ** best[1], best[1], best[0])

    def fit_all(self, y_RK: np.ndarray) -> np.ndarray:
        """c, a, b for every row of points, with b from the grid, whose steps of 4 % are far below its error."""
        best_R = np.maximum(self.rises(y_RK), 0).argmax(axis=1)
        c_R, a_R = self._solved(y_RK, self.directions_GK[best_R], self._powers_GK[best_R], self._lengths_G[best_R])
        b_R = _GRID_B[best_R]
        return np.stack([c_R, a_R * self._middle**b_R, b_R], axis=1)

    def rises(self, y_RK: np.ndarray) -> np.ndarray:
        """e_b . y for every row and every b of the grid, (R, G): below 0 where the points fall."""
        return self._solve(y_RK.T).T @ self.directions_GK.T

    def chi_square(self, y_K: np.ndarray, b: float) -> float:
        """Of the best curve with this b."""
        direction_1K, _, _ = self._directions(np.array([b]))
        return self._constant(y_K) - max(0.0, float(direction_1K[0] @ self._solve(y_K))) ** 2

    def _constant(self, y_K: np.ndarray) -> float:
        """Chi-square of the best constant."""
        white_K = self._solve(y_K)
        rest_K = white_K - self._one_K * (self._one_K @ white_K) / self._one_square
        return float(rest_K @ rest_K)

    def _directions(self, b_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        powers_GK = self._solve(self._relative_K[:, None] ** -b_G).T
        rest_GK = powers_GK - np.outer(powers_GK @ self._one_K, self._one_K) / self._one_square
        lengths_G = np.linalg.norm(rest_GK, axis=1)
        return -rest_GK / lengths_G[:, None], powers_GK, lengths_G

    def _solved(
        self, y_RK: np.ndarray, direction_RK: np.ndarray, power_RK: np.ndarray, length_R: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """c and a >= 0 by row, `a` still of sizes relative to their middle."""
        white_RK = self._solve(y_RK.T).T
        a_R = np.maximum(0.0, (white_RK * direction_RK).sum(axis=1)) / length_R
        return (white_RK + a_R[:, None] * power_RK) @ self._one_K / self._one_square, a_R

    def _solve(self, columns: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.factor_KK, columns)


def _no_curve(space: _Whitened, y_K: np.ndarray, widened: float) -> tuple[Literal["flat", "falling"], str] | None:
    """Whether the points rise at all, each direction against its greatest projection of noise."""
    noise_RG = _noise(len(y_K)) @ space.directions_GK.T
    seen_G = space.rises(y_K[None])[0]
    if np.mean(noise_RG.max(axis=1) >= seen_G.max()) <= SIGNIFICANCE:
        return None
    if np.mean((-noise_RG).max(axis=1) >= (-seen_G).max()) <= SIGNIFICANCE:
        return "falling", "falling: more data lowers the score here"
    scatter = f", though the points scatter {widened:.1f} times as far as their errors" if widened > 1 else ""
    return "flat", f"flat: more data buys nothing measurable here{scatter}"


def _widened(chi_square: float, freedom: int) -> float:
    """Birge's ratio, sqrt(chi-square / degrees of freedom), where the scatter is beyond chance (p < 0.05), else 1."""
    from scipy.special import chdtrc

    return math.sqrt(chi_square / freedom) if chdtrc(freedom, chi_square) < 0.05 else 1.0


def _change(n_K: np.ndarray, y_K: np.ndarray, covariance_KK: np.ndarray) -> Reading:
    """Generalised least squares of y on log n, times the range of log n."""
    design_K2 = np.stack([np.ones_like(n_K), np.log(n_K)], axis=1)
    inverse_KK = np.linalg.inv(covariance_KK)
    spread_22 = np.linalg.inv(design_K2.T @ inverse_KK @ design_K2)
    span = float(np.log(n_K.max() / n_K.min()))
    value = span * float((spread_22 @ design_K2.T @ inverse_KK @ y_K)[1])
    half = 1.96 * span * math.sqrt(spread_22[1, 1])
    return Reading(value, value - half, value + half)


def _noise(num_points: int) -> np.ndarray:
    """Standard normal draws (R, K), the same on every call."""
    return np.random.default_rng(0).standard_normal((NUM_DRAWS, num_points))


def _at(parameters: np.ndarray, num_rows: float) -> np.ndarray:
    return parameters[..., 0] - parameters[..., 1] * num_rows ** -parameters[..., 2]


def _reading(value: float | np.ndarray, draws_R: np.ndarray) -> Reading:
    low, high = np.quantile(draws_R, [0.025, 0.975])
    return Reading(float(value), min(float(low), float(value)), max(float(high), float(value)))
