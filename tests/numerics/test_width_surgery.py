"""A narrower checkpoint computes what the wide model does with the same channels silenced, for all families and spaces.

Silencing: what writes a channel is zero. A hidden channel that nothing writes stays zero in the residual stream, and a
norm of the wide model takes its mean over all channels, silent ones included.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import Channels, check_channels
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.families import family_of
from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import drop_blocks, prune_checkpoint
from tests.support import tiny

pytestmark = pytest.mark.slow

NUM_BLOCKS = 3
VARIANTS = [
    *(pytest.param(family, {}, id=family) for family in tiny.FAMILIES),
    *(pytest.param(family, {"tied": False}, id=f"{family}-untied") for family in ("llama", "phi3", "gemma2")),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
]
SPACES = ("hidden", "mlp", "kv_groups", "heads", "all")


def some(rng: random.Random, size: int, count: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(size), count)))


def choose(space: str, sizes: dict[str, int], num_blocks: int, rng: random.Random) -> Channels:
    """Random channels of the spaces named, and of those alone."""
    wanted = {"hidden", "mlp", "heads", "kv_groups"} if space == "all" else {space}
    width = sizes["heads"] // sizes["kv_groups"]
    num_groups = rng.randint(1, sizes["kv_groups"] - 1) if "kv_groups" in wanted else sizes["kv_groups"]
    num_heads = rng.randint(1, width - 1) if "heads" in wanted else width
    groups = [some(rng, sizes["kv_groups"], num_groups) for _ in range(num_blocks)]
    heads = [tuple(g * width + h for g in kept for h in some(rng, width, num_heads)) for kept in groups]
    num_mlp = rng.randint(1, sizes["mlp"] - 1)
    in_all = num_groups * num_heads
    num_hidden = in_all * rng.randint(1, (sizes["hidden"] - 1) // in_all)  # a multiple, as some families demand
    return Channels(
        hidden=some(rng, sizes["hidden"], num_hidden) if "hidden" in wanted else None,
        mlp=tuple(some(rng, sizes["mlp"], num_mlp) for _ in range(num_blocks)) if "mlp" in wanted else None,
        kv_groups=tuple(groups) if "kv_groups" in wanted else None,
        heads=tuple(heads) if "heads" in wanted else None,
    )


def silence(model: Any, channels: Channels) -> None:
    """Set to zero what the channels that go write, written out module by module and not by the families' table."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        if channels.hidden is not None:
            gone = [i for i in range(config.hidden_size) if i not in set(channels.hidden)]
            model.model.embed_tokens.weight[:, gone] = 0
            if not config.tie_word_embeddings:
                model.lm_head.weight[:, gone] = 0
            for layer in model.model.layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    linear.weight[gone] = 0
                    if linear.bias is not None:
                        linear.bias[gone] = 0
        for block, layer in enumerate(model.model.layers):
            if channels.mlp is not None:
                gone = [i for i in range(config.intermediate_size) if i not in set(channels.mlp[block])]
                layer.mlp.down_proj.weight[:, gone] = 0
            width = config.num_attention_heads // config.num_key_value_heads
            kept = set(range(config.num_attention_heads))
            if channels.kv_groups is not None:
                kept = {h for h in kept if h // width in set(channels.kv_groups[block])}
            if channels.heads is not None:
                kept &= set(channels.heads[block])
            for head in set(range(config.num_attention_heads)) - kept:
                layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0


def in_float64(source: Path) -> Any:
    """The model in float64, norms included, which transformers takes in float32 whatever comes in: where a handful of
    channels is left, float32's own rounding would grow beyond the bound from block to block.
    """
    model: Any = load_model(source, "float32").double()

    def normed(module: Any, args: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        weight = module.weight + (1 if family_of(model.config.to_dict()).norm_adds_one else 0)
        return args[0] * torch.rsqrt(args[0].square().mean(-1, keepdim=True) + eps) * weight

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(normed)
    return model


def check_equal(folder: Path, family: str, overrides: dict[str, Any], space: str, seed: int) -> None:
    overrides = {
        "num_blocks": NUM_BLOCKS,
        "hidden": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        **overrides,
    }
    overrides = {"head_dim": 8, **overrides} if family != "phi3" else overrides
    source = tiny.make_model(folder / "s", family, max_shard_bytes=40_000, rms_norm_eps=1e-12, **overrides)
    checkpoint = Checkpoint.open(source)
    rng = random.Random(seed)
    channels = choose(space, checkpoint.family.space_sizes(checkpoint.config), NUM_BLOCKS, rng)
    prune_checkpoint(source, folder / "t", range(NUM_BLOCKS), channels, max_shard_bytes=30_000)
    Checkpoint.open(folder / "t").check_tensors()
    wide, narrow = in_float64(source), in_float64(folder / "t")
    silence(wide, channels)
    ids_BT = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, found = wide(input_ids=ids_BT).logits, narrow(input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_slicing_equals_silencing(tmp_path: Path, family: str, overrides: dict[str, Any], space: str) -> None:
    if family == "qwen2":  # the other spaces: test_qwen2_loses_heads_and_hidden_channels_together
        space = "mlp"
    check_equal(tmp_path, family, overrides, space, seed=0)


@hypothesis.settings(max_examples=25, deadline=None)
@given(st.sampled_from([f for f in tiny.FAMILIES if f != "qwen2"]), st.sampled_from(SPACES), st.integers(1, 10**6))
def test_slicing_equals_silencing_for_random_plans(
    tmp_path_factory: pytest.TempPathFactory, family: str, space: str, seed: int
) -> None:
    check_equal(tmp_path_factory.mktemp("random"), family, {}, space, seed)


def test_qwen2_loses_heads_and_hidden_channels_together(tmp_path: Path) -> None:
    """vLLM takes the size of its heads from the hidden size, so 4 of 6 heads go with 32 of 48 channels."""
    source = tiny.make_model(
        tmp_path / "s",
        "qwen2",
        num_blocks=2,
        hidden=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        rms_norm_eps=1e-12,
    )
    groups = ((0, 2), (1, 2))
    channels = Channels(hidden=some(random.Random(0), 48, 32), kv_groups=groups)
    with pytest.raises(PlanError, match=r"6 heads of 8 channels do not give the hidden size 32 → transformers derives"):
        prune_checkpoint(source, tmp_path / "t", [0, 1], replace(channels, kv_groups=None))
    prune_checkpoint(source, tmp_path / "t", [0, 1], channels)
    wide: Any = load_model(source, "float32")
    silence(wide, channels)
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        found = load_model(tmp_path / "t", "float32")(input_ids=ids_BT).logits
        torch.testing.assert_close(found, wide(input_ids=ids_BT).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_phi3_with_longrope_loses_heads_and_hidden_channels_together(tmp_path: Path, share: float) -> None:
    half = int(8 * share) // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0 + i for i in range(half)], "long_factor": [3.0 + i for i in range(half)]}
    settings = {"hidden": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-12}
    source = tiny.make_model(
        tmp_path / "s", "phi3", num_blocks=2, rope_parameters={**rope, "partial_rotary_factor": share}, **settings
    )
    channels = Channels(hidden=some(random.Random(0), 48, 32), kv_groups=((0, 2), (1, 2)))
    with pytest.raises(PlanError, match="longrope"):
        prune_checkpoint(source, tmp_path / "t", [0, 1], replace(channels, kv_groups=None))
    prune_checkpoint(source, tmp_path / "t", [0, 1], channels)
    wide: Any = load_model(source, "float32")
    silence(wide, channels)
    for length in (5, 20):  # with short factors, and with long ones
        ids_BT = torch.arange(length)[None]
        with torch.no_grad():
            found = load_model(tmp_path / "t", "float32")(input_ids=ids_BT).logits
            torch.testing.assert_close(found, wide(input_ids=ids_BT).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_everything_is_the_identity_to_the_bit(tmp_path: Path, family: str) -> None:
    source = tiny.make_model(tmp_path / "s", family, dtype="bfloat16")
    sizes = Checkpoint.open(source).family.space_sizes(Checkpoint.open(source).config)
    everything = Channels(
        hidden=tuple(range(sizes["hidden"])),
        **{space: (tuple(range(sizes[space])),) * 4 for space in ("mlp", "kv_groups", "heads")},
    )
    prune_checkpoint(source, tmp_path / "t", range(4), everything)
    drop_blocks(source, tmp_path / "u", range(4))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "u" / name).read_bytes()
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "t" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_blocks_and_channels_go_together(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "s", "qwen3", num_blocks=4, dtype="float32", rms_norm_eps=1e-12)
    mlp = ((0, 5, 9), (2, 3, 60))
    prune_checkpoint(source, tmp_path / "t", [1, 3], Channels(mlp=mlp))
    stored = load_file(source / "model.safetensors")
    cut = load_file(tmp_path / "t" / "model.safetensors")
    for new, old in enumerate((1, 3)):
        up = stored[f"model.layers.{old}.mlp.up_proj.weight"]
        assert torch.equal(cut[f"model.layers.{new}.mlp.up_proj.weight"], up[list(mlp[new])])
        down = stored[f"model.layers.{old}.mlp.down_proj.weight"]
        assert torch.equal(cut[f"model.layers.{new}.mlp.down_proj.weight"], down[:, list(mlp[new])])
    assert load_model(tmp_path / "t", "float32").config.intermediate_size == 3


CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("channels", "told"),
    [
        (Channels(hidden=()), "keeps no member of hidden"),
        (Channels(hidden=(0, 0)), "not in strictly increasing order"),
        (Channels(hidden=tuple(range(1, 33))), "hidden has no member 32 → the model has members 0 to 31"),
        (Channels(hidden=tuple(range(30))), "30 is not a multiple of the 4 heads → .* keep 28 or 32 channels"),
        (Channels(mlp=((0, 1),)), "mlp is chosen for 1 of 2 blocks"),
        (Channels(mlp=((0, 1), (2,))), "between 1 and 2 members of mlp → .* vLLM and transformers read nothing else"),
        (Channels(kv_groups=((), ())), "keeps no member of kv_groups"),
        (Channels(heads=((0, 1, 2), (0, 1, 2))), r"block 0 keeps unequal numbers of heads .*0: 2, 1: 1"),
        (Channels(heads=((0, 1), (0, 1))), r"unequal numbers of heads in its key-value groups \(0: 2, 1: 0\)"),
        (Channels(kv_groups=((1,), (1,)), heads=((0,), (2,))), "keeps head 0 without its key-value group 0"),
    ],
)
def test_plans_that_nothing_could_load_are_refused(channels: Channels, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        check_channels(channels, CONFIG, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_are_scaled_to_the_nearest_value_of_their_dtype(tmp_path: Path, family: str, dtype: str) -> None:
    source = tiny.make_model(tmp_path / "s", family, hidden=32, dtype=dtype)
    kept = some(random.Random(0), 32, 20)
    prune_checkpoint(source, tmp_path / "t", range(4), Channels(hidden=kept))
    name = "model.layers.1.input_layernorm.weight"
    before = load_file(source / "model.safetensors")[name][list(kept)]
    shift = 1.0 if family == "gemma2" else 0.0
    expected = ((before.double() + shift) * (32 / 20) ** 0.5 - shift).to(before.dtype)
    assert torch.equal(load_file(tmp_path / "t" / "model.safetensors")[name], expected)
