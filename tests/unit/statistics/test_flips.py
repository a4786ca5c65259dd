"""Flips against a count by hand and scipy's limits; Holm against the closed test; the detectable effect by drawing."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.detectable import detectable_difference
from sdft_ray.statistics.flips import flips
from sdft_ray.statistics.multiple import holm
from sdft_ray.statistics.paired import mcnemar
from sdft_ray.statistics.scores import TaskScore
from sdft_ray.statistics.shares import wilson


def score(task: str, values: list[float], names: list[str] | None = None) -> TaskScore:
    items = dict(zip(names or [str(i) for i in range(len(values))], values, strict=True))
    mean = sum(values) / len(values)
    return TaskScore(task, "acc", "none", mean, None, len(values), 0, True, 0.25, items)


def test_flips_are_paired_by_name() -> None:
    first = score("a", [1, 1, 1, 0, 0], ["p", "q", "r", "s", "t"])
    second = score("a", [1, 0, 1, 0, 0], ["t", "s", "p", "q", "r"])  # gains t, loses q and r
    found = flips([(first, second)])
    assert found is not None
    assert (found.num_items, found.right_to_wrong.value, found.wrong_to_right.value) == (5, 2 / 5, 1 / 5)
    assert found.share == pytest.approx(3 / 5)


def test_tasks_add_up_and_graded_ones_are_left_out() -> None:
    right_or_wrong = score("a", [1.0] * 10), score("a", [0.0] * 2 + [1.0] * 8)
    other = score("b", [0.0] * 30), score("b", [1.0] * 3 + [0.0] * 27)
    graded = score("c", [0.5, 0.25]), score("c", [0.5, 0.75])
    found = flips([right_or_wrong, other, graded])
    assert found is not None
    assert (found.num_items, found.right_to_wrong.value, found.wrong_to_right.value) == (40, 2 / 40, 3 / 40)
    assert flips([graded]) is None
    with pytest.raises(EvaluationError, match="not scored on the same items of 'a'"):
        flips([(score("a", [1, 0]), score("a", [1, 0, 1]))])


@pytest.mark.parametrize(("count", "total"), [(0, 20), (1, 20), (37, 500), (500, 500), (3, 3)])
def test_wilsons_limits_are_scipys(count: int, total: int) -> None:
    found, theirs = wilson(count, total), binomtest(count, total).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 6), (3, 3), (2, 9), (30, 18)])
def test_the_mid_p_value_counts_the_observed_table_half(lost: int, gained: int) -> None:
    both = lost + gained
    first = score("a", [1.0] * lost + [0.0] * gained + [1.0])
    test = mcnemar(first, score("a", [0.0] * lost + [1.0] * gained + [1.0]))
    outcomes = binom.pmf(range(both + 1), both, 0.5)
    more, same = (
        sum(p for k, p in enumerate(outcomes) if relation(abs(2 * k - both), abs(lost - gained)))
        for relation in (int.__gt__, int.__eq__)
    )
    assert test.p_value == pytest.approx(more + same)
    assert test.mid_p == pytest.approx(1.0 if lost == gained else more + same / 2)


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """Adjusted: the largest Bonferroni p-value of all sets of hypotheses with this one (Marcus and others, 1976)."""
    random = np.random.default_rng(0)
    for _ in range(50):
        p_values = {f"t{i}": float(p) for i, p in enumerate(random.beta(0.4, 2.0, size=random.integers(1, 6)))}
        sets = [part for size in range(1, len(p_values) + 1) for part in combinations(p_values, size)]
        bonferroni = {part: min(1.0, len(part) * min(p_values[name] for name in part)) for part in sets}
        expected = {name: max(p for part, p in bonferroni.items() if name in part) for name in p_values}
        assert holm(p_values) == pytest.approx(expected)
    assert holm({}) == {}


@pytest.mark.parametrize(("num_items", "discordant"), [([500], 0.2), ([500] * 6, 0.2), ([1000, 200], 0.1)])
def test_the_detectable_difference_is_seen_four_times_in_five(num_items: list[int], discordant: float) -> None:
    """Drawn tables, tested by the difference over its standard error without a difference."""
    delta = detectable_difference(num_items, discordant)
    assert delta is not None
    random, draws = np.random.default_rng(1), 20_000
    shares = [(discordant + delta) / 2, (discordant - delta) / 2, 1 - discordant]
    value, variance = np.zeros(draws), np.zeros(draws)
    for count in num_items:
        gained, lost, _ = random.multinomial(count, shares, size=draws).T
        value += (gained - lost) / count / len(num_items)
        variance += (gained + lost) / count**2 / len(num_items) ** 2
    assert (np.abs(value) > 1.96 * np.sqrt(variance)).mean() == pytest.approx(0.8, abs=0.025)


def test_what_no_difference_would_show() -> None:
    assert detectable_difference([10], 0.2) is None
    more = [detectable_difference([count], 0.2) for count in (100, 400, 1600)]
    assert all(one is not None and other is not None and one > other for one, other in pairwise(more))
