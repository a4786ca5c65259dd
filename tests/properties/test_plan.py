"""Plans for any depth, any scores, any target."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdft_ray.errors import PlanError
from sdft_ray.models.config import config_with_blocks, layer_types
from sdft_ray.models.size import size_with_blocks
from sdft_ray.pruning.plan import PruningPlan, choose_blocks, resolve_num_removed
from sdft_ray.recipe.pruning import Depth

untimed = settings(deadline=None)  # a busy machine is no defect of the code


@dataclass(frozen=True)
class Scores:
    angular_last_LN: list[list[float | None]]
    angular_mean_LN: list[list[float | None]]
    block_influence_L: list[float]


def config_of(num_blocks: int, **fields: Any) -> dict[str, Any]:
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16}
    config |= {"num_hidden_layers": num_blocks, "num_attention_heads": 2, "num_key_value_heads": 1}
    return config | fields


@st.composite
def scored(draw: st.DrawFn) -> tuple[int, int, Scores]:
    """Blocks, number to remove, and scores with many ties."""
    num_blocks = draw(st.integers(2, 12))
    value = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])

    def matrix() -> list[list[float | None]]:
        return [
            [draw(value) if start + n <= num_blocks else None for start in range(num_blocks)]
            for n in range(1, num_blocks)
        ]

    influence = draw(st.lists(value, min_size=num_blocks, max_size=num_blocks))
    return num_blocks, draw(st.integers(1, num_blocks - 1)), Scores(matrix(), matrix(), influence)


@untimed
@given(scored(), st.sampled_from(["last", "mean"]))
def test_angular_distance_is_the_first_minimum(case, position):
    num_blocks, n, scores = case
    depth = Depth(metric="angular_distance", position=position, remove_blocks=n)
    removed = choose_blocks(depth, config_of(num_blocks), scores).removed_blocks
    matrix = scores.angular_last_LN if position == "last" else scores.angular_mean_LN
    best = None
    for start in range(num_blocks - n + 1):  # the naive search
        distance = matrix[n - 1][start]
        assert distance is not None
        if best is None or distance < best[0]:
            best = (distance, start)
    assert best is not None
    assert removed == tuple(range(best[1], best[1] + n))


@untimed
@given(scored())
def test_block_influence_removes_the_least(case):
    num_blocks, n, scores = case
    plan = choose_blocks(Depth(metric="block_influence", remove_blocks=n), config_of(num_blocks), scores)
    influence = scores.block_influence_L
    assert len(plan.removed_blocks) == n
    assert max(influence[b] for b in plan.removed_blocks) <= min(influence[b] for b in plan.keep_blocks)


@untimed
@given(st.integers(2, 40), st.integers(0, 10**6), st.data())
def test_random_plans_are_valid_and_nested(num_blocks, seed, data):
    n = data.draw(st.integers(1, num_blocks - 1))
    plans = [
        choose_blocks(Depth(metric="random", remove_blocks=count, seed=seed), config_of(num_blocks))
        for count in range(1, n + 1)
    ]
    assert all(set(a.removed_blocks) < set(b.removed_blocks) for a, b in pairwise(plans))
    assert PruningPlan.from_json(plans[-1].to_json()) == plans[-1]


@untimed
@given(st.integers(1, 40), st.integers(1, 30_000))
def test_the_fewest_blocks_that_meet_the_target(num_blocks, target):
    config = config_of(num_blocks)
    sizes = [size_with_blocks(config, num_blocks - n).num_parameters for n in range(num_blocks)]
    try:
        n = resolve_num_removed(Depth(metric="tail", max_parameters=target), config)
    except PlanError:
        assert target >= sizes[0] or target < sizes[-1]
    else:
        assert sizes[n] <= target < sizes[n - 1]


@untimed
@given(st.integers(2, 40), st.floats(0.001, 0.999))
def test_fractions_agree_with_counts(num_blocks, fraction):
    config = config_of(num_blocks)
    count = int(fraction * size_with_blocks(config, num_blocks).num_parameters)
    assume(count >= 1)
    answers = []
    for depth in (Depth(metric="tail", keep_parameters=fraction), Depth(metric="tail", max_parameters=count)):
        try:
            answers.append(resolve_num_removed(depth, config))
        except PlanError as error:
            answers.append(error.hint)
    assert answers[0] == answers[1]


@untimed
@given(
    st.sampled_from(["qwen2", "qwen3", "gemma2", "gemma3_text"]),
    st.sets(st.integers(0, 11), min_size=1),
    st.integers(0, 14),
    st.booleans(),
)
def test_pruning_twice_equals_pruning_once(model_type, first, max_window_layers, use_sliding_window):
    config = config_of(
        12,
        model_type=model_type,
        max_window_layers=max_window_layers,
        use_sliding_window=use_sliding_window,
        sliding_window=8,
    )
    keep = sorted(first)
    again = list(range(0, len(keep), 2))
    twice = config_with_blocks(config_with_blocks(config, keep), again)
    once = config_with_blocks(config, [keep[block] for block in again])
    assert layer_types(twice) == layer_types(once)
    assert twice["num_hidden_layers"] == once["num_hidden_layers"]
