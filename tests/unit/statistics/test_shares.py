"""Shares of rows, against figures from elsewhere and against enumeration."""

from __future__ import annotations

from math import comb

import pytest
from scipy.stats import binomtest

from sdft_ray.statistics.shares import is_surely_below, mcnemar_counts, wilson


@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 10), (15, 50), (46, 299), (50, 50)])
def test_wilson_is_that_of_scipy(count: int, total: int) -> None:
    found = wilson(count, total)
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((count / total, expected.low, expected.high))


def test_no_rows_have_no_share() -> None:
    assert wilson(0, 0).value is None


@pytest.mark.parametrize(("count", "total"), [(0, 64), (5, 64), (6, 64), (30, 200), (64, 64)])
def test_a_share_is_surely_below_by_the_exact_tail(count: int, total: int) -> None:
    tail = sum(comb(total, k) * 0.25**k * 0.75 ** (total - k) for k in range(count + 1))
    assert is_surely_below(count, total, 0.25, tail * 1.001)
    assert not is_surely_below(count, total, 0.25, tail * 0.999)


def test_nothing_is_sure_without_rows_or_without_a_bound() -> None:
    assert not is_surely_below(0, 0, 0.25, 0.01)
    assert not is_surely_below(0, 1000, 0.0, 0.01)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (8, 1), (5, 5)])
def test_mcnemar_is_the_sign_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_counts(first, second).p_value == pytest.approx(expected)
