"""Which trial is chosen: the rate by the mean over its seeds, then the seed; diverged trials count against a rate."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.errors import DivergenceError
from sdft_ray.training.trials import Outcome, best_trial


def outcomes(losses: dict[tuple[float, int], float | None]) -> list[Outcome]:
    return [
        Outcome(rate, seed, loss, "" if loss is not None else f"diverged at rate {rate}")
        for (rate, seed), loss in losses.items()
    ]


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({(1e-4, 0): 0.5, (2e-4, 0): 0.3, (4e-4, 0): 0.4}, (2e-4, 0)),
        # The lowest single loss belongs to an unsteady rate.
        ({(1e-4, 0): 0.5, (1e-4, 1): 0.4, (2e-4, 0): 0.1, (2e-4, 1): 1.9}, (1e-4, 1)),
        # A lost seed counts against its rate, a lost rate against nobody.
        ({(1e-4, 0): 0.5, (1e-4, 1): 0.5, (2e-4, 0): 0.1, (2e-4, 1): None}, (1e-4, 0)),
        ({(1e-4, 0): 0.5, (2e-4, 0): None}, (1e-4, 0)),
        # Every rate lost one: the means of what is left decide.
        ({(1e-4, 0): 0.5, (1e-4, 1): None, (2e-4, 0): None, (2e-4, 1): 0.4}, (2e-4, 1)),
        ({(1e-4, 0): 0.5, (1e-4, 1): None, (2e-4, 0): None, (2e-4, 1): None}, (1e-4, 0)),
        # Ties go to the lower rate and seed.
        ({(2e-4, 1): 0.5, (2e-4, 0): 0.5, (1e-4, 1): 0.5, (1e-4, 0): 0.5}, (1e-4, 0)),
    ],
)
def test_the_rule_by_examples(losses: dict[tuple[float, int], float | None], chosen: tuple[float, int]) -> None:
    for order in itertools.permutations(losses.items()):
        found = outcomes(dict(order))
        best = found[best_trial(found)]
        assert (best.learning_rate, best.seed) == chosen


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=5))
def test_without_losses_lost_it_is_the_lowest_mean_and_its_lowest_seed(table: list[list[float]]) -> None:
    found = outcomes({(1e-5 * (i + 1), seed): x for i, row in enumerate(table) for seed, x in enumerate(row)})
    best = found[best_trial(found)]
    row = table[round(best.learning_rate / 1e-5) - 1]
    assert fmean(row) <= min(fmean(other) for other in table) + 1e-12
    assert best.held_out_loss == min(row)


def test_when_all_are_lost_the_reason_is_told() -> None:
    with pytest.raises(DivergenceError, match=r"all 2 trials diverged; the first: diverged at rate 0.1 → give lower"):
        best_trial(outcomes({(0.1, 0): None, (0.2, 0): None}))
