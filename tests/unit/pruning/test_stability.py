"""How sure a choice is, against a bootstrap that is written out, and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sdft_ray.pruning.stability import stability


def naive(sums: list[list[float]], weights: list[float], count: int, num_draws: int = 4000) -> tuple[float, float]:
    """Share of the same choice, and the error of the difference at its edge, part by part in plain Python."""
    rng = random.Random(1)

    def scores(parts: list[int]) -> list[float]:
        total = sum(weights[k] for k in parts)
        return [sum(sums[k][s] for k in parts) / total for s in range(len(sums[0]))]

    def order(values: list[float]) -> list[int]:
        return sorted(range(len(values)), key=lambda s: values[s])

    every = order(scores(list(range(len(sums)))))
    same, moves = 0, []
    for _ in range(num_draws):
        values = scores([rng.randrange(len(sums)) for _ in sums])
        same += set(order(values)[:count]) == set(every[:count])
        moves.append(values[every[count]] - values[every[count - 1]])
    return same / num_draws, float(np.std(moves)) * (len(sums) / (len(sums) - 1)) ** 0.5


@pytest.mark.parametrize("count", [1, 2])
def test_against_a_bootstrap_that_is_written_out(count: int) -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(20, 60, 16).astype(float).tolist()
    levels = np.array([2.05, 2.0, 2.6, 2.1])
    sums = [(weight * (levels + rng.normal(0, 0.3, 4))).tolist() for weight in weights]
    found = stability(
        sums, weights, [(0, 1), (1, 2), (2, 3), (3, 4)] if count == 1 else [(0,), (1,), (2,), (3,)], count
    )
    assert found is not None
    share, stderr = naive(sums, weights, count)
    assert 0.3 < share < 0.99, "neither certain nor hopeless, or the test shows little"
    assert found.share == pytest.approx(share, abs=0.04)
    assert found.stderr == pytest.approx(stderr, rel=0.08)
    assert found.num_parts == 16


def test_a_clear_choice_is_always_the_same_and_its_runner_up_is_named() -> None:
    sums = [[10.0, 40.0, 20.0], [21.0, 82.0, 41.0], [9.0, 38.0, 19.0]]
    found = stability(sums, [10, 20, 10], [(0, 1), (1, 2), (2, 3)])
    assert found is not None
    assert (found.share, found.runner_up, found.num_parts) == (1.0, (2, 3), 3)
    assert found.difference == pytest.approx((80 - 40) / 40)
    swapped = stability(sums, [10, 20, 10], [(0,), (1,), (2,)], 2)
    assert swapped is not None
    assert (swapped.share, swapped.runner_up) == (1.0, (0, 1)), "block 1 in place of block 2"


def test_equal_scores_have_no_error_and_the_first_goes() -> None:
    found = stability([[1.0, 1.0]] * 4, [1] * 4, [(0,), (1,)])
    assert found is not None
    assert (found.share, found.difference, found.stderr, found.runner_up) == (1.0, 0.0, 0.0, (1,))


def test_nothing_to_resample_or_to_choose_from() -> None:
    assert stability([[1.0, 2.0]], [1], [(0,), (1,)]) is None
    assert stability([[1.0, 2.0], [0.0, 0.0]], [1, 0], [(0,), (1,)]) is None, "a part without weight says nothing"
    assert stability([[1.0], [2.0]], [1, 1], [(0,)]) is None
