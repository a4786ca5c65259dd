"""Whether 95 % intervals hold the truth in 95 % of simulated worlds; `jobs/bench/coverage.py` asks more of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from sdft_ray.statistics.paired import paired_bootstrap
from tests.support.interval_worlds import BOUND_HIGH, BOUND_LOW, ability, coverage, scored

pytestmark = pytest.mark.slow

NUM_WORLDS, DRAWS = 2000, 200


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    [
        "difference, 200 items, 0.95 and 0.80",
        "difference, 100 items, 0.50 and 0.50",
        "difference, 7 tasks of 200",
        "recovery, 200 items, 0.95 and 0.80",
        "crossed mean, 5 seeds",
        "crossed mean, 3 seeds",
        "crossed mean, 5 seeds, 0.50",
        "crossed difference, 5 seeds",
        "crossed recovery, 5 seeds",
    ],
)
def test_coverage(name: str) -> None:
    assert BOUND_LOW <= coverage(name, NUM_WORLDS, DRAWS) <= BOUND_HIGH


@pytest.mark.parametrize(
    "name", ["difference, 200 items, 0.95 and 0.80", "recovery, 200 items, 0.95 and 0.80", "crossed mean, 3 seeds"]
)
def test_coverage_in_a_quarter_of_the_worlds(name: str) -> None:
    """The bounds are wider by what the smaller number of worlds leaves to chance, two standard errors in all."""
    num_worlds = NUM_WORLDS // 4
    margin = 2 * math.sqrt(0.95 * 0.05) * (num_worlds**-0.5 - NUM_WORLDS**-0.5)
    assert BOUND_LOW - margin <= coverage(name, num_worlds, DRAWS) <= BOUND_HIGH + margin


def test_a_few_items_are_enough() -> None:
    """The second model loses some items of 200 and gains none: exact coverage, over all numbers that it may lose.

    A percentile interval, here from the binomial itself, leaves the truth out in a fifth of the worlds.
    """
    num_items, most = 200, 40
    ours, percentile = [], []
    for lost in range(most + 1):
        second = np.arange(num_items) >= lost
        found = paired_bootstrap(scored({"a": np.ones(num_items)}, 0.0), scored({"a": second.astype(float)}, 0.0))
        assert found.low is not None
        assert found.high is not None
        ours.append((-num_items * found.high, -num_items * found.low))
        percentile.append(binom.ppf([0.025, 0.975], num_items, lost / num_items))
    truths = np.linspace(2.5, 20, 71)
    covered = {}
    for name, found in (("ours", ours), ("percentile", percentile)):
        held_NT = [[low <= truth <= high for truth in truths] for low, high in found]
        covered[name] = np.einsum(
            "nt,nt->t", binom.pmf(np.arange(most + 1)[:, None], num_items, truths / num_items), held_NT
        )
    assert covered["ours"].min() >= 0.93
    assert 0.94 <= covered["ours"].mean() <= 0.97
    assert covered["percentile"].min() < 0.85


def test_the_worlds_have_the_means_that_they_name() -> None:
    """The simulator's own witness: a million draws."""
    random = np.random.default_rng(0)
    for mean, spread in ((0.95, 2.0), (0.5, 2.0), (0.02, 8.0)):
        logits = ability(mean, spread) + spread * random.normal(size=1_000_000)
        error = math.sqrt(mean * (1 - mean) / 1e6)
        assert np.mean(1 / (1 + np.exp(-logits))) == pytest.approx(mean, abs=4 * error)
