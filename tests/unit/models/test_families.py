"""Every table against the real architecture in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from sdft_ray.errors import ModelError
from sdft_ray.models.families import FAMILIES, family_of, join_block, num_blocks_of, split_block
from tests.support import tiny

OPTIONS = [
    pytest.param(family, overrides, id=f"{family}-{'-'.join(overrides) or 'plain'}")
    for family in tiny.FAMILIES
    for overrides in (
        {},
        {"tied": False},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 120},
    )
] + [
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"head_dim": 24}, id="llama-wide-heads"),
    pytest.param("qwen3", {"attention_bias": True}, id="qwen3-biases"),
    pytest.param("gemma2", {"attention_bias": True}, id="gemma2-biases"),
    pytest.param("gemma3_text", {"attention_bias": True}, id="gemma3_text-biases"),
]


def test_the_tests_cover_every_family():
    assert set(tiny.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize(("family", "overrides"), OPTIONS)
def test_table_equals_state_dict(family, overrides):
    model = tiny.build_model(family, num_blocks=3, **overrides)
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if overrides.get("tied", True):
        del actual["lm_head.weight"]  # the state dict shows the shared tensor twice
    config = model.config.to_dict()
    assert family_of(config).tensor_shapes(config) == actual


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_lora_targets_are_the_linear_maps_of_a_block(family):
    block = tiny.build_model(family).model.layers[0]
    linear = {n.rsplit(".", 1)[-1] for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(FAMILIES[family].lora_targets) == linear
    assert len(FAMILIES[family].lora_targets) == len(linear)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matmul_axes_are_output_then_input(family):
    """Every map reads from the residual stream or writes to it; only o_proj and down_proj write."""
    for tensor in FAMILIES[family].tensors:
        if tensor.role == "matmul":
            reads, writes = tensor.axes[1], tensor.axes[0]
            assert ("hidden",) in (reads, writes)
            assert (writes == ("hidden",)) == (tensor.module in {"o_proj", "down_proj"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_defaults_are_those_of_transformers(family):
    settings = AutoConfig.for_model(family)
    for name, value in FAMILIES[family].defaults.items():
        if name == "sliding_window" and family.startswith("qwen"):
            settings.use_sliding_window = True  # transformers shows None while windows are off
            value = None if not FAMILIES[family].defaults["use_sliding_window"] else value
        assert getattr(settings, name) == value, name
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):  # flags that a table asks for
        assert bool(FAMILIES[family].defaults.get(name)) == bool(getattr(settings, name, False)), name


def test_absent_fields_take_their_defaults():
    config = {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": None}
    sizes = FAMILIES["llama"].space_sizes(config)
    assert (sizes["kv_groups"], sizes["head_dim"]) == (4, 8)
    assert FAMILIES["qwen3"].space_sizes({**config, "model_type": "qwen3"})["head_dim"] == 128


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "4", True])
def test_sizes_must_be_positive_integers(value):
    config = tiny.build_model().config.to_dict()
    with pytest.raises(ModelError, match="intermediate_size"):
        FAMILIES["llama"].space_sizes({**config, "intermediate_size": value})
    with pytest.raises(ModelError, match="num_hidden_layers"):
        num_blocks_of({**config, "num_hidden_layers": value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no model_type"),
        ({"model_type": "gpt2"}, "unsupported architecture 'gpt2'.*llama, mistral, qwen2, qwen3, gemma2"),
        ({"model_type": ["llama"]}, "unsupported architecture"),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "vision.*gemma3_text",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "not a causal language",
        ),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, "not a causal language.*Qwen2ForCausalLM"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_refused_configs(config, message):
    with pytest.raises(ModelError, match=message) as caught:
        family_of(config)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_block_names():
    assert split_block("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert join_block(*split_block("model.layers.12.mlp.up_proj.weight") or (0, "")).startswith("model.layers.12.")
    assert split_block("model.embed_tokens.weight") is None
    assert split_block("lm_head.weight") is None
