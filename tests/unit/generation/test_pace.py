"""How long a sampler takes, told from a simulation of one that gives every running response a token at each step."""

from __future__ import annotations

import numpy as np
import pytest

from sdft_ray.generation.pace import Pace, constant_pace, fitted_pace


def simulated(pace: Pace, prompts: list[int], lengths: list[int], slots: int) -> list[float]:
    """When each response is finished; a free slot goes to the next one, whose prompt is read at once."""
    now, waiting, running = 0.0, list(range(len(lengths))), {}
    finished = [0.0] * len(lengths)
    while waiting or running:
        while waiting and len(running) < slots:
            index = waiting.pop(0)
            running[index] = lengths[index]
            now += pace.prompt_token_s * prompts[index]
        now += pace.step_s + pace.token_s * len(running)
        running = {index: left - 1 for index, left in running.items()}
        for index in [index for index, left in running.items() if not left]:
            finished[index] = now
            del running[index]
    return finished


def lengths_of(num_rows: int) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(3)
    return random.integers(50, 300, num_rows).tolist(), random.integers(5, 200, num_rows).tolist()


@pytest.mark.parametrize(
    "pace", [Pace(0.0004, 0.009, 0.05), Pace(0.0001, 0.0001, 0.03), Pace(0.001, 0.01, 0.0)], ids=str
)
def test_a_whole_set_is_told_from_a_few_rows(pace: Pace) -> None:
    """Also where a step costs as much with a few responses as with many, so that seconds per token would mislead."""
    prompts, lengths = lengths_of(48)
    found = fitted_pace(simulated(pace, prompts, lengths, 48), prompts, lengths)
    prompts, lengths = lengths_of(2000)
    expected = max(simulated(pace, prompts, lengths, 128))
    assert found.seconds(sum(prompts), sum(lengths), 128) == pytest.approx(expected, rel=0.15)


def test_a_constant_pace_spends_the_time_on_all_tokens() -> None:
    pace = constant_pace(10.0, [60, 20], [10, 10])
    assert pace.seconds(80, 20, 4) == pytest.approx(10.0)
    assert pace.seconds(800, 200, 64) == pytest.approx(100.0)


def test_times_that_no_steps_explain_fall_back() -> None:
    """A sampler that finishes everything at once, as one without continuous batching does."""
    prompts, lengths = [10] * 8, [5, 10, 15, 20, 25, 30, 35, 1]
    assert fitted_pace([0.0] * 7 + [9.0], prompts, lengths).step_s == 0.0


def test_nothing_sampled_takes_no_time() -> None:
    assert fitted_pace([], [], []).seconds(0, 0, 1) == 0.0
    assert constant_pace(0.0, [], []).seconds(10, 10, 1) == 0.0
