"""Learning rates by hand."""

from __future__ import annotations

import doctest

import pytest

from sdft_ray.training import schedule
from sdft_ray.training.schedule import learning_rate


def rates(kind, num_steps: int = 10, warmup: float = 0.2, decay: float = 0.5) -> list[float]:
    return [learning_rate(step, num_steps, 2.0, kind, warmup, decay) for step in range(num_steps)]


def test_linear():
    assert rates("linear") == pytest.approx([1, 2, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25])


def test_wsd_stays_then_falls_over_the_last_half():
    assert rates("wsd") == pytest.approx([1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4])


def test_constant():
    assert rates("constant") == pytest.approx([1] + [2] * 9)


def test_cosine_is_half_way_down_in_the_middle():
    found = rates("cosine", num_steps=8, warmup=0.0)
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.0)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(2 * 0.0380602, rel=1e-5)  # (1 - cos(pi / 8)) / 2


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_step_learns_and_none_exceeds_the_peak(kind, warmup: float, decay: float, num_steps: int):
    found = rates(kind, num_steps, warmup, decay)
    assert max(found) == pytest.approx(2.0)
    assert min(found) > 0


def test_the_documented_example():
    assert doctest.testmod(schedule).attempted > 0
    assert doctest.testmod(schedule).failed == 0
