"""Which channels stay: the most active ones, equally many where engines need that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import check_channels, config_with_channels
from sdft_ray.models.families import family_of
from sdft_ray.pruning.width import Widths, choose_channels

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


def test_the_most_active_stay() -> None:
    scores = random_scores()
    found = choose_channels(Widths(hidden=10, mlp=7, heads=8), scores, CONFIG, [0, 2])
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
    whole = choose_channels(Widths(kv_groups=2), scores, CONFIG, [0, 1, 2])
    fewer = choose_channels(Widths(kv_groups=2, heads=2), scores, CONFIG, [0, 1, 2])
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


def test_equals_go_by_place() -> None:
    scores = {space: np.zeros_like(values) for space, values in random_scores().items()}
    found = choose_channels(Widths(hidden=3, mlp=2), scores, CONFIG, [1])
    assert (found.hidden, found.mlp) == ((0, 1, 2), ((0, 1),))


@given(st.integers(1, 24), st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_every_choice_can_be_written_and_a_narrower_one_is_a_part_of_it(
    hidden: int, mlp: int, groups: int, each: int, seed: int
) -> None:
    scores = random_scores(seed)
    wide = choose_channels(Widths(hidden, mlp, groups * each, groups), scores, CONFIG, [0, 2])
    check_channels(wide, CONFIG, 2)
    config = config_with_channels(CONFIG, wide)
    sizes = family_of(config).space_sizes(config)
    assert [sizes[s] for s in ("hidden", "mlp", "heads", "kv_groups")] == [hidden, mlp, groups * each, groups]
    assert sizes["head_dim"] == 8
    narrow = choose_channels(Widths(max(1, hidden - 1), max(1, mlp - 3)), scores, CONFIG, [0, 2])
    assert set(narrow.hidden or ()) <= set(wide.hidden or ())
    assert all(set(few) <= set(many) for few, many in zip(narrow.mlp or (), wide.mlp or (), strict=True))


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        (Widths(hidden=25), "cannot keep 25 of 24 members of hidden → keep 1 to 24"),
        (Widths(mlp=0), "cannot keep 0 of 40 members of mlp"),
        (Widths(kv_groups=0), "cannot keep 0 of 4 members of kv_groups"),
        (Widths(heads=6), "6 heads cannot be shared evenly by 4 key-value groups of at most 3 → keep a multiple of 4"),
        (Widths(heads=8, kv_groups=2), "8 heads cannot be shared evenly by 2 key-value groups of at most 3"),
    ],
)
def test_widths_that_cannot_be(widths: Widths, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        choose_channels(widths, random_scores(), CONFIG, [0, 1])


def test_scores_of_another_model_or_without_sense() -> None:
    scores = random_scores()
    with pytest.raises(PlanError, match=r"scores of mlp have the shape \[3, 39\], the model 40 members"):
        choose_channels(Widths(mlp=3), {**scores, "mlp": scores["mlp"][:, 1:]}, CONFIG, [0])
    with pytest.raises(PlanError, match=r"scores of mlp have the shape \[2, 40\]"):
        choose_channels(Widths(mlp=3), {**scores, "mlp": scores["mlp"][1:]}, CONFIG, [0, 2])
    scores["heads"][1, 1] = np.nan
    with pytest.raises(PlanError, match="scores of heads hold values that are no numbers"):
        choose_channels(Widths(mlp=3), scores, CONFIG, [0])
