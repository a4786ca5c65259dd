"""Learning curves: known parameters come back, intervals cover, and data that say nothing are refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.curve import B_RANGE, Curve, NotFitted, Point, Reading, extrapolate, fit_curve

SIZES = (125, 300, 700, 1700, 4000)
C, A, B = 0.93, 3.0, 0.6


def curve(n: Any, c: float = C, a: float = A, b: float = B) -> Any:
    return c - a * np.asarray(n, float) ** -b


def made(means: Any, stderr: float, sizes: tuple[int, ...] = SIZES) -> list[Point]:
    return [Point(n, float(mean), stderr) for n, mean in zip(sizes, means, strict=True)]


def fitted(points: list[Point], covariance: np.ndarray | None = None) -> Curve:
    found = fit_curve(points, covariance)
    assert isinstance(found, Curve), found
    return found


def refused(points: list[Point]) -> NotFitted:
    found = fit_curve(points)
    assert isinstance(found, NotFitted), found
    return found


def holds(reading: Reading, value: float) -> bool:
    return reading.low <= value <= reading.high


@pytest.mark.parametrize(("c", "a", "b"), [(0.93, 3.0, 0.6), (0.8, 1.5, 0.4), (1.02, 40.0, 1.3), (3.0, 60.0, 0.9)])
def test_exact_points_give_their_parameters_back(c: float, a: float, b: float) -> None:
    found = fitted(made(curve(SIZES, c, a, b), 0.001))
    assert (found.c, found.a, found.b) == pytest.approx((c, a, b), rel=1e-3)
    assert found.chi_square == pytest.approx(0, abs=1e-6)
    assert found.predict(8000).value == pytest.approx(float(curve(8000, c, a, b)), abs=1e-6)
    assert (found.smallest, found.largest, found.num_sizes, found.note) == (125, 4000, 5, "")


def test_it_is_the_weighted_least_squares_that_scipy_finds() -> None:
    """Errors differ between sizes, and the spread of the draws is that of the linearised covariance."""
    rng = np.random.default_rng(1)
    sigma = 0.003 * np.array([2.0, 1.5, 1.0, 0.7, 0.5])
    y = curve(SIZES) + sigma * rng.standard_normal(5)
    found = fitted([Point(n, m, s) for n, m, s in zip(SIZES, y, sigma, strict=True)])
    peer, spread = curve_fit(curve, SIZES, y, p0=(C, A, B), sigma=sigma, absolute_sigma=True)
    assert (found.c, found.a, found.b) == pytest.approx(tuple(peer), rel=1e-3)
    assert found.draws_R3[:, 0].std() == pytest.approx(float(np.sqrt(spread[0, 0])), rel=0.25)
    assert found.draws_R3[:, 2].std() == pytest.approx(float(np.sqrt(spread[2, 2])), rel=0.25)


def test_errors_that_sizes_share_lift_the_curve_and_cancel_in_gains() -> None:
    shared = np.full((5, 5), 0.01**2) + np.diag(np.full(5, 0.002**2))
    y = curve(SIZES) + 0.01 + np.array([0.001, -0.002, 0.001, 0.001, -0.001])
    together, apart = fitted(made(y, 0.01), shared), fitted(made(y, float(np.sqrt(shared[0, 0]))))
    peer, _ = curve_fit(curve, SIZES, y, p0=(C, A, B), sigma=shared, absolute_sigma=True)
    assert (together.c, together.a, together.b) == pytest.approx(tuple(peer), rel=1e-3)
    assert together.widened == 1

    def width(reading: Reading) -> float:
        return reading.high - reading.low

    assert width(together.gain(4000, 8000)) < 0.4 * width(apart.gain(4000, 8000))
    assert width(together.predict(700)) > width(apart.predict(700))
    assert width(together.predict(700)) == pytest.approx(2 * 1.96 * 0.01, rel=0.15)


@pytest.mark.slow
def test_intervals_cover() -> None:
    rng = np.random.default_rng(3)
    inside: dict[str, list[bool]] = {"asymptote": [], "twice": [], "ten times": [], "gain": [], "within": []}
    for _ in range(120):
        found = fit_curve(made(curve(SIZES) + 0.004 * rng.standard_normal(5), 0.004))
        if isinstance(found, NotFitted) or found.asymptote is None:
            continue
        inside["asymptote"].append(holds(found.asymptote, C))
        inside["twice"].append(holds(found.predict(8000), float(curve(8000))))
        inside["ten times"].append(holds(found.predict(40_000), float(curve(40_000))))
        inside["gain"].append(holds(found.gain(4000, 8000), float(curve(8000) - curve(4000))))
        inside["within"].append(holds(found.predict(700), float(curve(700))))
    assert len(inside["twice"]) > 110
    for name, hits in inside.items():
        assert 0.88 <= np.mean(hits) <= 1, name


def test_the_unit_of_rows_does_not_matter() -> None:
    y = curve(SIZES) + np.array([0.002, -0.001, 0.001, 0.0, -0.001])
    rows, kilorows = fitted(made(y, 0.003)), fitted(made(y, 0.003, tuple(1000 * n for n in SIZES)))
    assert kilorows.b == pytest.approx(rows.b, rel=1e-4)
    assert kilorows.a == pytest.approx(rows.a * 1000**rows.b, rel=1e-3)
    assert kilorows.predict(8_000_000) == pytest.approx(rows.predict(8000), rel=1e-4)
    assert fitted(made(y, 0.003)).predict(8000) == rows.predict(8000)


def test_what_more_rows_are_worth() -> None:
    found = fitted(made(curve(SIZES), 0.002))
    twice, fourfold, tenfold = extrapolate(found, 4000)
    assert [part.num_rows for part in (twice, fourfold, tenfold)] == [8000, 16_000, 40_000]
    for part in (twice, fourfold, tenfold):
        assert part.gain is not None
        assert part.gain.value == pytest.approx(float(curve(part.num_rows) - curve(4000)), abs=1e-5)
        assert 0 <= part.gain.low <= part.gain.value <= part.gain.high
        assert not part.reason
    further = extrapolate(found, 4000, factors=(11,))[0]
    assert (further.gain, further.score) == (None, None)
    assert "10 times" in further.reason


@pytest.mark.parametrize("num_rows", [124, 0, 40_001])
def test_nothing_is_said_out_of_reach(num_rows: int) -> None:
    found = fitted(made(curve(SIZES), 0.002))
    with pytest.raises(EvaluationError, match="predicts nothing at"):
        found.predict(num_rows)
    with pytest.raises(EvaluationError, match="predicts nothing at"):
        found.gain(4000, num_rows)


@pytest.mark.parametrize(("c", "a", "b", "stderr"), [(2.0, 2.0, 0.06, 0.004), (0.95, 1.0, 0.15, 0.004)])
def test_without_a_ceiling_in_sight_only_one_doubling_is_predicted(c: float, a: float, b: float, stderr: float) -> None:
    """A curve that is nearly straight in log n, and one with most of its way before it."""
    found = fitted(made(curve(SIZES, c, a, b), stderr))
    assert found.asymptote is None
    assert "asymptote is open" in found.note
    assert holds(found.gain(4000, 8000), float(curve(8000, c, a, b) - curve(4000, c, a, b)))
    twice, fourfold, tenfold = extrapolate(found, 4000)
    assert twice.gain is not None
    assert fourfold.gain is tenfold.gain is None
    assert "one doubling" in fourfold.reason
    with pytest.raises(EvaluationError, match="at most 8,000"):
        found.predict(8001)


def test_flat_is_said_in_words() -> None:
    found = refused(made([0.901, 0.899, 0.902, 0.9, 0.901], 0.004))
    assert found.kind == "flat"
    assert "more data buys nothing measurable here" in found.reason
    assert found.change is not None
    assert holds(found.change, 0)


def test_noise_is_rarely_taken_for_a_rise() -> None:
    rng = np.random.default_rng(4)
    kinds = [type(fit_curve(made(0.9 + 0.01 * rng.standard_normal(5), 0.01))) for _ in range(60)]
    assert kinds.count(Curve) <= 5  # 1.5 are expected; 6 or more would come by chance once in 200


def test_falling_is_not_called_flat() -> None:
    found = refused(made(0.9 - 0.02 * np.log2(np.array(SIZES) / 125), 0.004))
    assert found.kind == "falling"
    assert "lowers the score" in found.reason
    assert found.change is not None
    assert found.change.value == pytest.approx(-0.02 * np.log2(32))
    assert found.change.high < 0


def test_the_change_is_that_of_a_weighted_straight_line() -> None:
    y, sigma = np.array([0.9, 0.88, 0.91]), np.array([0.01, 0.02, 0.015])
    found = refused([Point(n, m, s) for n, m, s in zip(SIZES[:3], y, sigma, strict=True)])
    slope, spread = np.polyfit(np.log(SIZES[:3]), y, 1, w=1 / sigma, cov="unscaled")
    span = np.log(SIZES[2] / SIZES[0])
    assert found.change is not None
    assert found.change.value == pytest.approx(span * slope[0])
    assert found.change.high - found.change.low == pytest.approx(2 * 1.96 * span * np.sqrt(spread[0, 0]))


def test_few_sizes_are_refused() -> None:
    found = refused(made(curve(SIZES[:3]), 0.004, SIZES[:3]))
    assert (found.kind, found.reason) == ("few", "a curve needs 4 sizes, and there are 3")
    repeated = (125, 125, 300, 300, 700)
    assert refused(made(curve(repeated), 0.004, repeated)).kind == "few"
    assert refused(made([0.5], 0.1, (125,))).change is None
    assert refused([]).reason == "a curve needs 4 sizes, and there are 0"


def test_points_that_scatter_widen_the_errors_and_say_so() -> None:
    y = curve(SIZES) + np.array([0.02, -0.02, 0.02, -0.02, 0.02])
    tight, loose = fitted(made(y, 0.004)), fitted(made(y, 0.02))
    assert tight.widened == pytest.approx(np.sqrt(tight.chi_square / 2))
    assert f"{tight.widened:.1f} times" in tight.note
    assert (loose.widened, loose.c) == (1.0, pytest.approx(tight.c, rel=1e-3))
    widths = [reading.high - reading.low for reading in (tight.predict(700), loose.predict(700))]
    assert widths[0] / widths[1] == pytest.approx(tight.widened * 0.004 / 0.02, rel=0.15)


@pytest.mark.parametrize(
    "point", [Point(0, 0.5, 0.1), Point(125, float("nan"), 0.1), Point(125, 0.5, 0.0), Point(125, 0.5, float("inf"))]
)
def test_impossible_points_are_refused(point: Point) -> None:
    with pytest.raises(EvaluationError, match="cannot be a point"):
        fit_curve([point, *made(curve(SIZES[1:]), 0.01, SIZES[1:])])


def test_exponents_stay_in_range() -> None:
    step = fitted(made([0.5, 0.9, 0.9, 0.9, 0.9], 0.01))
    assert step.b == pytest.approx(B_RANGE[1], rel=0.01)
    assert np.all((step.draws_R3[:, 2] >= B_RANGE[0] - 1e-9) & (step.draws_R3[:, 2] <= B_RANGE[1] + 1e-9))
    assert np.all(step.draws_R3[:, 1] >= 0)
