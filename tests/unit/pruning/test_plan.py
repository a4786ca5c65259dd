"""Choosing blocks: each rule on scores written by hand, each target against arithmetic done by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import Channels
from sdft_ray.pruning.plan import PruningPlan, choose_blocks, resolve_num_removed
from sdft_ray.recipe.pruning import Depth

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
BLOCK = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k and v, o, MLP, two norms
OUTSIDE = 100 * 8 + 8
FULL = OUTSIDE + 5 * BLOCK


@dataclass(frozen=True)
class Scores:
    """What importance/depth measures, by hand: 5 blocks."""

    angular_last_LN: list[list[float | None]] = field(
        default_factory=lambda: [
            [0.4, 0.2, 0.1, 0.3, 0.5],
            [0.4, 0.25, 0.22, 0.3, None],
            [0.5, 0.3, 0.4, None, None],
            [0.7, 0.6, None, None, None],
        ]
    )
    angular_mean_LN: list[list[float | None]] = field(
        default_factory=lambda: [
            [0.5, 0.1, 0.4, 0.4, 0.5],
            [0.2, 0.2, 0.2, 0.2, None],
            [0.5, 0.6, 0.4, None, None],
            [0.6, 0.7, None, None, None],
        ]
    )
    block_influence_L: list[float] = field(default_factory=lambda: [0.9, 0.05, 0.3, 0.02, 0.05])


def removed(metric: str, n: int, **options) -> tuple[int, ...]:
    depth = Depth(metric=metric, remove_blocks=n, **options)  # type: ignore[arg-type]
    scores = Scores() if metric in {"angular_distance", "block_influence"} else None
    plan = choose_blocks(depth, CONFIG, scores)
    assert sorted((*plan.keep_blocks, *plan.removed_blocks)) == list(range(5))
    assert (plan.model_type, plan.num_blocks, len(plan.removed_blocks)) == ("llama", 5, n)
    plan.validate(CONFIG)
    return plan.removed_blocks


@pytest.mark.parametrize(("n", "expected"), [(1, (2,)), (2, (2, 3)), (3, (1, 2, 3)), (4, (1, 2, 3, 4))])
def test_angular_distance_at_the_last_token(n, expected):
    assert removed("angular_distance", n) == expected


@pytest.mark.parametrize(("n", "expected"), [(1, (1,)), (2, (0, 1)), (3, (2, 3, 4)), (4, (0, 1, 2, 3))])
def test_angular_distance_of_the_mean_and_the_first_of_equals(n, expected):
    assert removed("angular_distance", n, position="mean") == expected


@pytest.mark.parametrize(("n", "expected"), [(1, (3,)), (2, (1, 3)), (3, (1, 3, 4)), (4, (1, 2, 3, 4))])
def test_block_influence(n, expected):
    assert removed("block_influence", n) == expected


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ends(n):
    assert removed("tail", n) == tuple(range(5 - n, 5))  # the very last block goes as well (arXiv:2411.15558)
    assert removed("first", n) == tuple(range(n))


def test_random_is_seeded_nested_and_reaches_every_block():
    seen = {removed("random", 2, seed=seed) for seed in range(200)}
    assert len(seen) == math.comb(5, 2)
    for seed in range(10):
        chosen = [set(removed("random", n, seed=seed)) for n in (1, 2, 3, 4)]
        assert all(small < large for small, large in pairwise(chosen))
    assert removed("random", 3, seed=7) == (2, 3, 4)  # stays so: a plan is part of an artifact's identity


def test_explicit_names_the_removed_blocks():
    depth = Depth(metric="explicit", blocks=(3, 0))
    assert choose_blocks(depth, CONFIG).keep_blocks == (1, 2, 4)
    assert resolve_num_removed(depth, CONFIG) == 2
    assert choose_blocks(Depth(metric="explicit", blocks=()), CONFIG).removed_blocks == ()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [((1, 1), "twice"), ((5,), "no block 5 → the model has blocks 0 to 4"), ((-1,), "no block -1"),
     ((0, 1, 2, 3, 4), "cannot remove 5 of 5 blocks → remove at most 4")],
)  # fmt: skip
def test_explicit_refused(blocks, message):
    with pytest.raises(PlanError, match=message):
        choose_blocks(Depth(metric="explicit", blocks=blocks), CONFIG)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (FULL - 1, 1),
        (FULL - BLOCK, 1),
        (FULL - BLOCK - 1, 2),
        (OUTSIDE + BLOCK, 4),
    ],
)
def test_parameter_count(target, expected):
    assert resolve_num_removed(Depth(metric="tail", max_parameters=target), CONFIG) == expected


def test_parameter_fraction():
    assert resolve_num_removed(Depth(metric="tail", keep_parameters=0.999), CONFIG) == 1
    for n in range(1, 5):
        just_enough = (FULL - n * BLOCK) / FULL
        assert resolve_num_removed(Depth(metric="tail", keep_parameters=just_enough + 1e-6), CONFIG) == n
    wide = {**CONFIG, "vocab_size": 10 * BLOCK, "hidden_size": 8}  # one block is about an eightieth
    assert resolve_num_removed(Depth(metric="tail", keep_parameters=0.99), wide) == 1


def test_a_fraction_is_exact():
    """0.408 of 5,000 is 2,040, what 5 of 7 blocks less leave; in binary floating point it is a bit less."""
    config = {**CONFIG, "vocab_size": 106, "num_hidden_layers": 7}
    full = 106 * 8 + 8 + 7 * BLOCK
    assert (full, full - 5 * BLOCK) == (5_000, 2_040)
    assert 0.408 * full < 2_040
    assert resolve_num_removed(Depth(metric="tail", keep_parameters=0.408), config) == 5


def test_llama31_8b_to_the_papers_size():
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert resolve_num_removed(Depth(metric="tail", max_parameters=6_730_000_000), config) == 6
    assert resolve_num_removed(Depth(metric="tail", keep_parameters=0.8371), config) == 6
    assert resolve_num_removed(Depth(metric="tail", keep_parameters=0.8369), config) == 7


@pytest.mark.parametrize("options", [{"max_parameters": OUTSIDE + BLOCK - 1}, {"keep_parameters": 0.01}])
def test_unreachable(options):
    smallest = f"{OUTSIDE + BLOCK:,}"
    with pytest.raises(
        PlanError, match=f"no number of removed blocks reaches the target.*{smallest}, with 1 of 5 blocks"
    ):
        choose_blocks(Depth(metric="tail", **options), CONFIG)


def test_nothing_to_do():
    with pytest.raises(PlanError, match="no more than the target"):
        resolve_num_removed(Depth(metric="tail", max_parameters=FULL), CONFIG)


@pytest.mark.parametrize("n", [5, 6, 500])
def test_too_many(n):
    with pytest.raises(PlanError, match=f"cannot remove {n} of 5 blocks → remove at most 4"):
        choose_blocks(Depth(metric="tail", remove_blocks=n), CONFIG)


@pytest.mark.parametrize(
    "scores",
    [
        Scores(block_influence_L=[0.1] * 4),
        Scores(angular_last_LN=[[0.1] * 5] * 3),
        Scores(angular_mean_LN=[[0.1] * 4, [0.1] * 4, [0.1] * 3, [0.1] * 2]),
    ],
)
def test_scores_of_another_model(scores):
    with pytest.raises(PlanError, match="the model has 5"):
        choose_blocks(Depth(remove_blocks=1), CONFIG, scores)


def test_scores_that_are_no_numbers():
    bad = replace(Scores(), block_influence_L=[0.1, 0.2, math.nan, 0.1, 0.1])
    with pytest.raises(PlanError, match="not finite"):
        choose_blocks(Depth(metric="block_influence", remove_blocks=1), CONFIG, bad)
    rows = Scores().angular_last_LN
    with pytest.raises(PlanError, match="not finite"):
        choose_blocks(Depth(remove_blocks=1), CONFIG, Scores(angular_last_LN=[[None] * 5, *rows[1:]]))


def test_json_round_trip():
    plan = PruningPlan("qwen3", 6, (0, 1, 5))
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == {"keep_blocks": [0, 1, 5], "model_type": "qwen3", "num_blocks": 6}


def test_channels_are_part_of_a_plan():
    channels = Channels(hidden=(0, 2), mlp=((1, 3), (0, 3)))
    plan = PruningPlan("qwen3", 6, (0, 5), channels)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.identity().keys() == {"keep_blocks", "model_type", "num_blocks", "channels_sha256"}
    others = (Channels(hidden=(0, 3), mlp=channels.mlp), Channels(hidden=(0, 2)))
    digests = {PruningPlan("qwen3", 6, (0, 5), other).identity()["channels_sha256"] for other in (channels, *others)}
    assert len(digests) == 3
    whole = PruningPlan("qwen3", 6, (0, 5))
    assert whole.identity() == json.loads(whole.to_json())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"keep_blocks": [0], "model_type": "llama", "num_blocks": 2, "x": 1}',
     '{"keep_blocks": [0.0], "model_type": "llama", "num_blocks": 2}',
     '{"keep_blocks": "01", "model_type": "llama", "num_blocks": 2}',
     '{"keep_blocks": [0], "model_type": "llama", "num_blocks": "2"}',
     '{"keep_blocks": [2], "model_type": "llama", "num_blocks": 2}',
     '{"keep_blocks": [], "model_type": "llama", "num_blocks": 2}',
     '{"keep_blocks": [0], "model_type": "llama", "num_blocks": 2, "channels": []}',
     '{"keep_blocks": [0], "model_type": "llama", "num_blocks": 2, "channels": {"vocab": [0]}}',
     '{"keep_blocks": [0], "model_type": "llama", "num_blocks": 2, "channels": {"mlp": [0]}}',
     '{"keep_blocks": [0], "model_type": "llama", "num_blocks": 2, "channels": {"hidden": [0.5]}}'],
)  # fmt: skip
def test_json_refused(text):
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)


@pytest.mark.parametrize("other", [{"num_hidden_layers": 6}, {"model_type": "mistral"}])
def test_plan_for_another_model(other):
    plan = choose_blocks(Depth(metric="tail", remove_blocks=2), CONFIG)
    with pytest.raises(PlanError, match="the plan is for a llama of 5 blocks"):
        plan.validate({**CONFIG, **other})


def test_a_plan_with_channels_for_a_model_of_another_shape():
    plan = replace(choose_blocks(Depth(metric="tail", remove_blocks=4), CONFIG), channels=Channels(mlp=((0, 10**6),)))
    with pytest.raises(PlanError, match="mlp has no member 1000000"):
        plan.validate(CONFIG)
