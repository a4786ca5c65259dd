"""What a target makes of open amounts: against counts of every model that could have been taken, written by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import config_with_sizes
from sdft_ray.models.families import family_of
from sdft_ray.models.size import size_of, size_with_blocks
from sdft_ray.pruning.plan import resolve_num_removed
from sdft_ray.pruning.target import Candidate, candidates, describe, resolve_target
from sdft_ray.pruning.width import resolve_sizes
from sdft_ray.recipe.pruning import Depth, Patch, Pruning, Target, Width
from tests.support.counted_models import (
    CASES,
    DTYPE_BYTES,
    LLAMA,
    NONE_GOES,
    OPEN,
    QWEN3,
    Sizes,
    amounts_of,
    imbalance,
    memory,
    parameters,
    sizes_of,
    whole,
    widths,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(CASES),
    is_deep=st.booleans(),
    asked=st.floats(0.05, 0.99),
    is_count=st.booleans(),
    context_batch=st.none() | st.tuples(st.integers(1, 200), st.integers(1, 8)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_the_largest_of_each_number_of_blocks_compete_by_proportion(
    case: tuple[dict[str, Any], tuple[str, ...], int],
    is_deep: bool,
    asked: float,
    is_count: bool,
    context_batch: tuple[int, int] | None,
    dtype: str,
) -> None:
    config, spaces, multiple_of = case

    def counted(num_blocks: int, sizes: Sizes) -> int:
        if context_batch is None:
            return parameters(config, num_blocks, sizes)
        return memory(config, num_blocks, sizes, DTYPE_BYTES[dtype], context_batch[0] * context_batch[1])

    full_blocks = config["num_hidden_layers"]
    bound = math.floor(Fraction(str(asked)) * counted(full_blocks, whole(config)))
    amount = bound if is_count else asked
    if context_batch is None:
        target = Target(parameters=amount)
    else:
        target = Target(memory_bytes=amount, context_tokens=context_batch[0], batch_rows=context_batch[1])
    asked_for = Pruning(
        depth=OPEN if is_deep else NONE_GOES,
        width=Width.model_validate({**dict.fromkeys(spaces, "target"), "multiple_of": multiple_of}),
        target=target,
    )
    every = {(n, s) for s in widths(config, spaces, multiple_of) for n in range(1, full_blocks + 1)}
    fitting = [(n, s) for n, s in every if (is_deep or n == full_blocks) and counted(n, s) <= bound]
    if not fitting:
        with pytest.raises(PlanError, match="no model that the recipe allows meets the target"):
            resolve_target(asked_for, config, dtype=dtype)
        return
    found = amounts_of(asked_for, config, dtype)
    assert found in fitting
    largest: dict[int, int] = {}
    for n, s in fitting:
        largest[n] = max(largest.get(n, 0), parameters(config, n, s))
    assert parameters(config, *found) == largest[found[0]]
    rivals = [imbalance(config, n, s) for n, s in fitting if parameters(config, n, s) == largest[n]]
    assert imbalance(config, *found) == pytest.approx(min(rivals), abs=1e-8)


@pytest.mark.parametrize(("config", "spaces", "multiple_of"), CASES)
def test_candidates_are_every_width_with_every_number_of_blocks(
    config: dict[str, Any], spaces: tuple[str, ...], multiple_of: int
) -> None:
    width = Width.model_validate({**dict.fromkeys(spaces, "target"), "multiple_of": multiple_of})
    found = candidates(OPEN, width, config, dtype="bfloat16")
    everything = {
        (n, s) for s in widths(config, spaces, multiple_of) for n in range(1, config["num_hidden_layers"] + 1)
    }
    shown = [(candidate.num_blocks, sizes_of(candidate)) for candidate in found]
    assert len(shown) == len(everything)
    assert set(shown) == everything
    order = [(candidate.num_blocks, candidate.size.num_parameters) for candidate in found]
    assert order == sorted(order)
    for candidate in found[:: len(found) // 20 + 1]:
        n, sizes = candidate.num_blocks, sizes_of(candidate)
        assert candidate.size.num_parameters == parameters(config, n, sizes)
        assert candidate.size == size_with_blocks(config_with_sizes(config, candidate.sizes), n, dtype="bfloat16")
        assert candidate.imbalance == pytest.approx(imbalance(config, n, sizes))


def asks(share: float) -> tuple[Pruning, Depth]:
    return Pruning(depth=OPEN, target=Target(parameters=share)), Depth(metric="tail", keep_parameters=share)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 0.999))
def test_open_depth_alone_is_depth_by_its_share_of_parameters(share: float) -> None:
    by_target, by_share = asks(share)
    try:
        expected = resolve_num_removed(by_share, QWEN3)
    except PlanError:
        with pytest.raises(PlanError, match="no model that the recipe allows meets the target"):
            resolve_target(by_target, QWEN3, dtype="float32")
        return
    depth, width = resolve_target(by_target, QWEN3, dtype="float32")
    assert (depth, width) == (Depth(metric="tail", remove_blocks=expected), None)


def test_a_share_is_exact_and_a_count_is_met_to_the_last_parameter() -> None:
    """5,000 parameters in 7 blocks, 2,040 in 2: 0.408 of the former in decimal, a little less in binary."""
    config = {**LLAMA, "vocab_size": 106, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 7}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert (size_with_blocks(config, 7).num_parameters, size_with_blocks(config, 2).num_parameters) == (5_000, 2_040)
    assert resolve_target(asks(0.408)[0], config, dtype="float32")[0].remove_blocks == 5
    for count, removed in ((2_040, 5), (2_039, 6), (4_999, 1)):
        asked = Pruning(depth=OPEN, target=Target(parameters=count))
        assert resolve_target(asked, config, dtype="float32")[0].remove_blocks == removed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_counts_weights_and_the_cache_of_a_batch(dtype: str) -> None:
    element_bytes, sizes = DTYPE_BYTES[dtype], whole(QWEN3)
    for n in range(1, 6):
        just = memory(QWEN3, n, sizes, element_bytes, 30 * 4)
        for amount, blocks in ((just, n), (just - 1, n - 1)):
            target = Target(memory_bytes=amount, context_tokens=30, batch_rows=4)
            asked = Pruning(depth=OPEN, target=target)
            if blocks:
                assert amounts_of(asked, QWEN3, dtype) == (blocks, sizes)
            else:
                with pytest.raises(
                    PlanError, match=f"no model that the recipe allows meets the target of {amount:,} bytes"
                ):
                    resolve_target(asked, QWEN3, dtype=dtype)


def test_a_long_context_is_paid_for_in_groups() -> None:
    """Where keys and values are nearly everything, half of the memory is half of the groups."""
    target = Target(memory_bytes=0.51, context_tokens=10_000, batch_rows=16)
    asked = Pruning(width=Width(kv_groups="target"), target=target)
    assert amounts_of(asked, QWEN3) == (6, (24, 40, 6, 2))


@pytest.mark.parametrize(("multiple_of", "hidden"), [(1, 18), (2, 18), (4, 16), (8, 16), (6, 18)])
def test_open_width_alone_keeps_to_its_multiple(multiple_of: int, hidden: int) -> None:
    bound = parameters(QWEN3, 6, (18, 40, 12, 4))
    asked = Pruning(width=Width(hidden="target", multiple_of=multiple_of), target=Target(parameters=bound))
    depth, width = resolve_target(asked, QWEN3, dtype="float32")
    assert depth == NONE_GOES
    assert width == Width(hidden=hidden, multiple_of=multiple_of)


def test_open_spaces_shrink_alike_and_depth_with_them() -> None:
    asked = Pruning(depth=OPEN, width=Width(hidden="target", mlp="target"), target=Target(parameters=0.5))
    blocks, (hidden, mlp, heads, groups) = amounts_of(asked, QWEN3)
    assert (heads, groups) == (12, 4)
    assert abs(hidden / 24 - mlp / 40) < 1 / 24
    assert 1 < blocks < 6
    assert imbalance(QWEN3, blocks, (hidden, mlp, heads, groups)) < math.log(6 / 5)


def test_fixed_amounts_stay_as_they_are() -> None:
    fixed_space = Width(heads=8, mlp="target", over_tokens="l2")
    bound = parameters(QWEN3, 6, (24, 21, 8, 4))
    depth, width = resolve_target(Pruning(width=fixed_space, target=Target(parameters=bound)), QWEN3, dtype="float32")
    assert (depth, width) == (NONE_GOES, Width(heads=8, mlp=21, over_tokens="l2"))
    fixed_depth = Depth(metric="block_influence", remove_blocks=2)
    bound = parameters(QWEN3, 4, (24, 21, 12, 4))
    asked = Pruning(depth=fixed_depth, width=Width(mlp="target"), target=Target(parameters=bound))
    assert resolve_target(asked, QWEN3, dtype="float32") == (fixed_depth, Width(mlp=21))
    both = Pruning(depth=OPEN, width=Width(heads=0.67, mlp="target"), target=Target(parameters=0.4))
    _, width = resolve_target(both, QWEN3, dtype="float32")
    assert width is not None
    assert width.heads == 0.67
    assert isinstance(width.mlp, int)


@pytest.mark.parametrize(("groups", "heads"), [(2, 6), (0.75, 9)])
def test_all_heads_of_the_groups_that_stay_may_stay(groups: float, heads: int) -> None:
    bound = parameters(QWEN3, 6, (24, 39, heads, heads // 3))
    width = Width(kv_groups=groups, heads="target", mlp="target")
    asked = Pruning(width=width, target=Target(parameters=bound))
    assert amounts_of(asked, QWEN3) == (6, (24, 39, heads, heads // 3))


@pytest.mark.parametrize("blocks", [1, 3, 5, 6])
def test_beside_a_fixed_width_as_many_blocks_stay_as_the_target_allows(blocks: int) -> None:
    """Proportion is for what is open: a width that is given is no reason to give up blocks."""
    bound = parameters(QWEN3, blocks, (24, 20, 12, 4))
    asked = Pruning(depth=OPEN, width=Width(mlp=0.5), target=Target(parameters=bound))
    assert amounts_of(asked, QWEN3) == (blocks, (24, 20, 12, 4))


@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.5])
def test_a_space_may_stay_whole_that_is_no_multiple(share: float) -> None:
    """24 channels in steps of 16: what is answered can be asked for, whether 16 or all of them stay."""
    asked = Pruning(depth=OPEN, width=Width(hidden="target", multiple_of=16), target=Target(parameters=share))
    blocks, sizes = amounts_of(asked, QWEN3)
    assert sizes[0] in {16, 24}
    assert parameters(QWEN3, blocks, sizes) <= share * parameters(QWEN3, 6, whole(QWEN3))


def test_when_no_block_has_to_go_none_does() -> None:
    asked = Pruning(depth=OPEN, width=Width(mlp="target"), target=Target(parameters=0.99))
    depth, width = resolve_target(asked, QWEN3, dtype="float32")
    assert depth == NONE_GOES
    assert width == Width(mlp=38)


def test_without_a_target_nothing_changes() -> None:
    asked = Pruning(depth=Depth(remove_blocks=2), width=Width(mlp=0.5), patch=Patch())
    assert resolve_target(asked, QWEN3, dtype="float32") == (asked.depth, asked.width)


@pytest.mark.parametrize(
    "target",
    [
        Target(parameters=parameters(QWEN3, 6, whole(QWEN3))),
        Target(memory_bytes=memory(QWEN3, 6, whole(QWEN3), 4, 3), context_tokens=3),
    ],
)
def test_a_model_that_meets_the_target_as_it_is(target: Target) -> None:
    with pytest.raises(PlanError, match=r"the model has [\d,]+ (parameters|bytes), .* → give a smaller target"):
        resolve_target(Pruning(depth=OPEN, target=target), QWEN3, dtype="float32")


def test_a_target_out_of_reach_is_answered_by_the_nearest_models() -> None:
    asked = Pruning(depth=OPEN, target=Target(parameters=100))
    with pytest.raises(PlanError, match="no model that the recipe allows meets the target of 100 parameters") as caught:
        resolve_target(asked, QWEN3, dtype="float32")
    told = [
        f"{parameters(QWEN3, n, whole(QWEN3)):,} parameters with {n} blocks, hidden 24, mlp 40, heads 12, kv_groups 4"
        for n in (1, 2, 3)
    ]
    assert caught.value.hint == f"nearest: {'; '.join(told)}"
    in_bytes = Pruning(width=Width(mlp="target"), target=Target(memory_bytes=100, context_tokens=2))
    nearest = f"{memory(QWEN3, 6, (24, 1, 12, 4), 2, 2):,} bytes with 6 blocks, hidden 24, mlp 1, heads 12, kv_groups 4"
    with pytest.raises(PlanError, match=f"target of 100 bytes → nearest: {nearest}; "):
        resolve_target(in_bytes, QWEN3, dtype="bfloat16")


@pytest.mark.parametrize("target", [Target(speedup=1.5), Target(tokens_per_s=100.0)])
def test_a_speed_has_to_be_measured(target: Target) -> None:
    with pytest.raises(PlanError, match=r"known only after a measurement"):
        resolve_target(Pruning(depth=OPEN, target=target), QWEN3, dtype="float32")


def test_a_llama_keeps_a_multiple_of_its_heads() -> None:
    found = {
        candidate.sizes["hidden"] for candidate in candidates(OPEN, Width(hidden="target"), LLAMA, dtype="float32")
    }
    assert found == set(range(4, 33, 4))
    bound = parameters(LLAMA, 5, (27, 48, 4, 2))
    asked = Pruning(width=Width(hidden="target"), target=Target(parameters=bound))
    assert amounts_of(asked, LLAMA) == (5, (24, 48, 4, 2))


QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 3584,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("multiple_of", [1, 128])
def test_hidden_and_heads_shrink_together_where_engines_take_one_from_the_other(multiple_of: int) -> None:
    """28 heads of 128: four, eight, ... of them go with as many channels, sevenths of both."""
    width = Width(hidden="target", heads="target", multiple_of=multiple_of)
    found = {(c.sizes["hidden"], c.sizes["heads"]) for c in candidates(NONE_GOES, width, QWEN2, dtype="float32")}
    assert found == {(128 * heads, heads) for heads in range(4, 29, 4)}


def test_no_width_can_be_loaded() -> None:
    with pytest.raises(PlanError, match="which is not divisible over 5 ranks"):
        candidates(OPEN, Width(mlp="target", tensor_parallel=5), QWEN3, dtype="float32")


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (
            Width(mlp=20, tensor_parallel=5),
            "12 members of heads, which is not divisible over 5 ranks → keep a multiple",
        ),
        (Width(heads=4, tensor_parallel=8), "4 members of heads, which is not divisible over 8 ranks"),
        (Width(mlp=24, tensor_parallel=3), "4 members of kv_groups, which is not divisible over 3 ranks"),
        (Width(mlp=24, tensor_parallel=6), "4 members of kv_groups, which is not divisible over 6 ranks"),
        (Width(kv_groups=3, mlp=24, tensor_parallel=9), "24 members of mlp, which is not divisible over 9 ranks"),
        (Width(mlp=21, tensor_parallel=2), "21 members of mlp, which is not divisible over 2 ranks → .* multiple of 2"),
        (Width(hidden=12, tensor_parallel=12), "40 members of mlp, which is not divisible over 12 ranks"),
    ],
)
def test_ranks_that_could_not_share_are_refused(width: Width, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        resolve_sizes(width, QWEN3)


def test_ranks_may_hold_copies_of_groups() -> None:
    width = Width(mlp=24, tensor_parallel=12)  # three ranks for each of four groups
    assert resolve_sizes(width, QWEN3) == {**family_of(QWEN3).space_sizes(QWEN3), "mlp": 24}
    assert resolve_sizes(Width(kv_groups=2, tensor_parallel=2), QWEN3)["heads"] == 6
    assert resolve_sizes(Width(kv_groups=1, heads=2, tensor_parallel=2), QWEN3)["kv_groups"] == 1


def test_an_open_width_takes_what_ranks_can_share() -> None:
    bound = parameters(QWEN3, 6, (24, 31, 12, 4))
    asked = Pruning(width=Width(mlp="target", tensor_parallel=4), target=Target(parameters=bound))
    assert amounts_of(asked, QWEN3) == (6, (24, 28, 12, 4))


def test_a_candidate_fills_in_what_is_open_alone() -> None:
    sizes = {**family_of(QWEN3).space_sizes(QWEN3), "hidden": 20, "mlp": 30, "heads": 8}
    candidate = Candidate(4, sizes, size_of(QWEN3), (0.5, 0.5))
    assert candidate.imbalance == 0
    assert describe(candidate) == "4 blocks, hidden 20, mlp 30, heads 8, kv_groups 4"
    depth = Depth(metric="perplexity", drop="one", remove_blocks="target", seed=3)
    width = Width(hidden="target", mlp=0.5, heads="target", multiple_of=2)
    filled = candidate.amounts(depth, width, QWEN3)
    assert filled == (
        Depth(metric="perplexity", drop="one", remove_blocks=2, seed=3),
        Width(hidden=20, mlp=0.5, heads=8, multiple_of=2),
    )
    fixed = Depth(remove_blocks=3), Width(mlp=7)
    assert candidate.amounts(*fixed, QWEN3) == fixed
    all_stay = Candidate(6, sizes, size_of(QWEN3), (1.0, 0.5))
    assert all_stay.amounts(depth, None, QWEN3) == (NONE_GOES, None)
    assert all_stay.imbalance == pytest.approx(math.log(2))
