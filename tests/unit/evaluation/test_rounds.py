"""Figures over rounds against numpy's quantiles, and ratios in which a slow round falls out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.evaluation.rounds import over_rounds, ratio

SECONDS = st.floats(min_value=1e-4, max_value=1e4)


@given(st.lists(SECONDS, min_size=1, max_size=9))
def test_median_and_quartiles_are_numpys(values: list[float]) -> None:
    found = over_rounds(values)
    assert found.rounds == tuple(values)
    expected = np.quantile(values, [0.25, 0.5, 0.75])
    assert [found.low, found.median, found.high] == pytest.approx(expected.tolist())


@given(st.lists(st.tuples(SECONDS, st.floats(min_value=0.1, max_value=10)), min_size=1, max_size=9))
def test_what_slows_both_falls_out(rounds: list[tuple[float, float]]) -> None:
    times, factors = zip(*rounds, strict=True)
    found = ratio(over_rounds(t * factor for t, factor in rounds), over_rounds(times))
    assert found.rounds == pytest.approx(factors)


def test_rounds_of_two_figures_are_the_same_ones() -> None:
    with pytest.raises(ValueError, match="longer"):
        ratio(over_rounds([1.0]), over_rounds([1.0, 2.0]))
    with pytest.raises(AssertionError, match="needs a round"):
        over_rounds([])
