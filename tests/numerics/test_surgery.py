"""What a pruned checkpoint computes, against models that surgery had no hand in, for every family.

Sequences are longer than the windows: a block that got another block's window or rotary base shows.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import drop_blocks
from tests.support import tiny

pytestmark = pytest.mark.slow

NUM_BLOCKS = 6
WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
VARIANTS = [
    *(pytest.param(family, {}, id=family) for family in tiny.FAMILIES),
    pytest.param("llama", {"tied": False}, id="llama-untied"),
    pytest.param("phi3", {"tied": False}, id="phi3-untied"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("mistral", {"sliding_window": 8}, id="mistral-window"),
    pytest.param("phi3", {"sliding_window": 8}, id="phi3-window"),
    pytest.param("qwen2", WINDOWED, id="qwen2-window"),
    pytest.param("qwen3", WINDOWED, id="qwen3-window"),
    pytest.param("gemma3_text", {"dtype": "bfloat16"}, id="gemma3_text-bf16"),
]
CONTIGUOUS, SCATTERED = (2, 3), (1, 4, 5)


class Skip(nn.Module):
    """In the place of a removed block: hands the residual stream on."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def tokens(num_rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 128, (num_rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids_BT, use_cache=False).logits


def kept(cut: tuple[int, ...]) -> list[int]:
    return [block for block in range(NUM_BLOCKS) if block not in cut]


def pruned_pair(
    tmp_path: Path, family: str, cut: tuple[int, ...], **overrides: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher in memory and the pruned model from disk."""
    overrides = {"num_blocks": NUM_BLOCKS, "max_shard_bytes": 60_000, **overrides}
    source = tiny.make_model(tmp_path / "s", family, **overrides)
    drop_blocks(source, tmp_path / "t", kept(cut), max_shard_bytes=50_000)
    return load_model(source, "auto"), load_model(tmp_path / "t", "auto")


@pytest.mark.parametrize("cut", [CONTIGUOUS, SCATTERED], ids=str)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_equals_the_teacher_with_blocks_skipped(tmp_path, family, overrides, cut):
    """Every kept block does what it did in the teacher, mask and rotary base included."""
    teacher, pruned = pruned_pair(tmp_path, family, cut, **overrides)
    whole = logits_of(teacher, tokens())
    for block in cut:
        teacher.model.layers[block] = Skip()  # type: ignore[index, operator]
    skipped = logits_of(teacher, tokens())
    assert torch.equal(logits_of(pruned, tokens()), skipped)
    assert not torch.equal(whole, skipped)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_equals_a_freshly_built_smaller_model(tmp_path, family, overrides):
    cut = CONTIGUOUS
    teacher, pruned = pruned_pair(tmp_path, family, cut, **overrides)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = NUM_BLOCKS - len(cut)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[block] for block in kept(cut)]
    fresh = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype).eval()
    weights = {}
    for name, tensor in teacher.state_dict().items():
        old = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if old is None:
            weights[name] = tensor
        elif int(old[1]) in kept(cut):
            weights[f"model.layers.{kept(cut).index(int(old[1]))}.{old[2]}"] = tensor
    fresh.load_state_dict(weights)
    assert torch.equal(logits_of(pruned, tokens()), logits_of(fresh, tokens()))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_cached_equals_uncached_decoding(tmp_path, family, overrides):
    """Blocks that keep their old index break the cache, or share a slot; uncached passes hide it."""
    _, pruned = pruned_pair(tmp_path, family, SCATTERED, **{**overrides, "dtype": "float32"})
    input_ids_BT = tokens()
    expected_BTV = logits_of(pruned, input_ids_BT)
    with torch.no_grad():
        out = pruned(input_ids=input_ids_BT[:, :5], use_cache=True)
        steps = [out.logits]
        for position in range(5, input_ids_BT.shape[1]):
            out = pruned(
                input_ids=input_ids_BT[:, position : position + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
    assert len(out.past_key_values.layers) == len(kept(SCATTERED))
    torch.testing.assert_close(torch.cat(steps, dim=1), expected_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate_with_and_without_cache(tmp_path, family):
    model: Any = pruned_pair(tmp_path, family, SCATTERED)[1]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    cached = model.generate(tokens(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **options))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_config_and_tokenizer_reload(tmp_path, family, overrides):
    _, pruned = pruned_pair(tmp_path, family, SCATTERED, **overrides)
    pruned.save_pretrained(tmp_path / "again")
    first, second = AutoConfig.from_pretrained(tmp_path / "t"), AutoConfig.from_pretrained(tmp_path / "again")
    assert {**first.to_dict(), "_name_or_path": ""} == {**second.to_dict(), "_name_or_path": ""}
    assert first.num_hidden_layers == len(kept(SCATTERED))
    assert len(getattr(first, "layer_types", None) or kept(SCATTERED)) == first.num_hidden_layers
    assert AutoTokenizer.from_pretrained(tmp_path / "t").chat_template == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("family", "overrides", "absent"),
    [
        ("gemma2", {}, {"layer_types"}),
        ("gemma3_text", {"sliding_window_pattern": 3}, {"layer_types", "_sliding_window_pattern"}),
        ("qwen2", WINDOWED, {"layer_types"}),
        ("qwen3", WINDOWED, {"layer_types"}),
    ],
)
def test_configs_from_before_layer_types(tmp_path, family, overrides, absent):
    """Checkpoints on the hub that give a pattern instead of a list."""
    source = tiny.make_model(tmp_path / "s", family, num_blocks=NUM_BLOCKS, **overrides)
    config = json.loads((source / "config.json").read_text())
    old = {name: value for name, value in config.items() if name not in absent}
    if family == "gemma3_text":
        old["sliding_window_pattern"] = 3
    (source / "config.json").write_text(json.dumps(old))
    teacher = load_model(source, "auto")
    drop_blocks(source, tmp_path / "t", kept((1, 2)))
    for block in (1, 2):
        teacher.model.layers[block] = Skip()  # type: ignore[index, operator]
    assert torch.equal(logits_of(load_model(tmp_path / "t", "auto"), tokens()), logits_of(teacher, tokens()))
