"""Which channels stay: the most active ones, equally many where engines need that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import Channels, config_with_channels
from sdft_ray.models.families import family_of
from sdft_ray.pruning.width import choose_channels, narrowed_config, resolve_sizes
from sdft_ray.recipe.pruning import Width

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
SIZES = {"hidden": 24, "mlp": 40, "heads": 12, "kv_groups": 4}


def random_scores(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {space: rng.random(size if space == "hidden" else (3, size)) for space, size in SIZES.items()}


def sizes(**changed: int) -> dict[str, int]:
    return {**family_of(CONFIG).space_sizes(CONFIG), **changed}


def test_the_most_active_stay() -> None:
    scores = random_scores()
    found = choose_channels(sizes(hidden=10, mlp=7, heads=8), scores, CONFIG, [0, 2])
    assert found.hidden == tuple(sorted(np.argsort(scores["hidden"])[-10:].tolist()))
    assert found.mlp is not None
    assert found.mlp[1] == tuple(sorted(np.argsort(scores["mlp"][2])[-7:].tolist()))
    assert found.kv_groups is None
    assert found.heads is not None
    for place, block in enumerate((0, 2)):
        for group in range(4):
            inside = scores["heads"][block, group * 3 : group * 3 + 3]
            kept = [head for head in found.heads[place] if head // 3 == group]
            assert kept == sorted((group * 3 + np.argsort(inside)[-2:]).tolist())


def test_heads_follow_their_groups() -> None:
    scores = random_scores(1)
    whole = choose_channels(sizes(kv_groups=2, heads=6), scores, CONFIG, [0, 1, 2])
    fewer = choose_channels(sizes(kv_groups=2, heads=2), scores, CONFIG, [0, 1, 2])
    assert whole.kv_groups == fewer.kv_groups
    assert whole.kv_groups is not None
    assert whole.heads is not None
    assert fewer.heads is not None
    for block in range(3):
        groups = whole.kv_groups[block]
        assert groups == tuple(sorted(np.argsort(scores["kv_groups"][block])[-2:].tolist()))
        assert whole.heads[block] == tuple(group * 3 + head for group in groups for head in range(3))
        best = [group * 3 + int(scores["heads"][block, group * 3 : group * 3 + 3].argmax()) for group in groups]
        assert fewer.heads[block] == tuple(best)


def test_equals_go_by_place_and_whole_spaces_are_left_alone() -> None:
    scores = {space: np.zeros_like(values) for space, values in random_scores().items()}
    found = choose_channels(sizes(hidden=3, mlp=2), scores, CONFIG, [1])
    assert found == Channels(hidden=(0, 1, 2), mlp=((0, 1),))
    assert choose_channels(sizes(), scores, CONFIG, [0, 1]) == Channels()


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_every_choice_can_be_written_and_a_narrower_one_is_a_part_of_it(
    hidden: int, mlp: int, groups: int, each: int, seed: int
) -> None:
    scores = random_scores(seed)
    narrow = resolve_sizes(Width(hidden=hidden, mlp=mlp, heads=groups * each, kv_groups=groups), CONFIG)
    assert narrow == sizes(hidden=hidden, mlp=mlp, heads=groups * each, kv_groups=groups)
    wide = choose_channels(narrow, scores, CONFIG, [0, 2])
    config = config_with_channels(CONFIG, wide)
    assert family_of(config).space_sizes(config) == narrow
    part = choose_channels({**narrow, "hidden": max(1, hidden - 1), "mlp": max(1, mlp - 3)}, scores, CONFIG, [0, 2])
    everything = tuple(range(40))
    assert set(part.hidden or ()) <= set(wide.hidden or everything)
    pairs = zip(part.mlp or ((), ()), wide.mlp or (everything,) * 2, strict=True)
    assert all(set(few) <= set(many) for few, many in pairs)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (Width(hidden=0.5, mlp=0.7), {"hidden": 12, "mlp": 28}),
        (Width(hidden=0.75, mlp=0.7, multiple_of=8), {"hidden": 16, "mlp": 24}),
        (Width(heads=0.67), {"heads": 8}),
        (Width(kv_groups=0.5), {"kv_groups": 2, "heads": 6}),
        (Width(kv_groups=3, heads=0.5), {"kv_groups": 3, "heads": 6}),
    ],
)
def test_shares_are_rounded_down_to_what_can_be(width: Width, expected: dict[str, int]) -> None:
    assert resolve_sizes(width, CONFIG) == sizes(**expected)
    config = narrowed_config(width, CONFIG)
    assert family_of(config).space_sizes(config) == sizes(**expected)


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (Width(hidden=25), "width.hidden: cannot keep 25 of 24 members → keep 1 to 24"),
        (Width(mlp=0.01), "width.mlp: cannot keep 0.01 of 40 members → keep 1 to 40"),
        (Width(mlp=30, multiple_of=16), "width.mlp: cannot keep 30 of 40 members → keep 16 to 32, in steps of 16"),
        (Width(kv_groups=0.2), "width.kv_groups: cannot keep 0.2 of 4 members → keep 1 to 4"),
        (Width(heads=6), "width.heads: cannot keep 6 of 12 members → keep 4 to 12, in steps of 4"),
        (Width(heads=8, kv_groups=2), "width.heads: cannot keep 8 of 12 members → keep 2 to 6, in steps of 2"),
    ],
)
def test_widths_that_cannot_be(width: Width, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        resolve_sizes(width, CONFIG)


def test_what_engines_would_not_load_is_refused_before_anything_is_measured() -> None:
    llama = {**CONFIG, "model_type": "llama"}
    with pytest.raises(PlanError, match=r"the hidden size 20 is not a multiple of the 12 heads → .* keep 12 or 24"):
        resolve_sizes(Width(hidden=20), llama)
    qwen2 = {**CONFIG, "model_type": "qwen2", "hidden_size": 96}
    with pytest.raises(PlanError, match="12 heads of 8 channels do not give the hidden size 48"):
        resolve_sizes(Width(hidden=0.5), qwen2)
    assert resolve_sizes(Width(hidden=0.5, kv_groups=0.5), qwen2)["heads"] == 6


def test_scores_of_another_model_or_without_sense() -> None:
    scores = random_scores()
    with pytest.raises(PlanError, match=r"scores of mlp have the shape \[3, 39\], the model 40 members"):
        choose_channels(sizes(mlp=3), {**scores, "mlp": scores["mlp"][:, 1:]}, CONFIG, [0])
    with pytest.raises(PlanError, match=r"scores of mlp have the shape \[2, 40\]"):
        choose_channels(sizes(mlp=3), {**scores, "mlp": scores["mlp"][1:]}, CONFIG, [0, 2])
    scores["heads"][1, 1] = np.nan
    with pytest.raises(PlanError, match="scores of heads have values that are not finite"):
        choose_channels(sizes(mlp=3), scores, CONFIG, [0])


PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("share", "length"), [(1.0, 4), (0.75, 3)])
def test_longrope_of_phi3(field: str, share: float, length: int) -> None:
    """transformers takes the length of its factors from hidden size / heads: both are pruned alike, or neither."""
    config = {**PHI3, field: {"short_factor": [1.0] * length, "long_factor": [2.0] * length}}
    config["partial_rotary_factor"] = share
    assert resolve_sizes(Width(mlp=32), config)["mlp"] == 32
    alike = resolve_sizes(Width(hidden=32, kv_groups=2), config)
    assert (alike["hidden"], alike["heads"]) == (32, 4)
    for width in (Width(hidden=32), Width(kv_groups=2), Width(hidden=16, kv_groups=1, heads=1)):
        with pytest.raises(PlanError, match=rf"longrope .* has {length} values in short_factor, but .* alike"):
            resolve_sizes(width, config)
    assert resolve_sizes(Width(hidden=32), {**config, field: None})["hidden"] == 32
