"""Sizes against published figures, torch's own counts and the bytes that a cache really holds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.size import size_of, size_with_blocks
from tests.support import tiny

LLAMA31_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Published or exact counts of models on the hub; the fields are those of their config.json.
QWEN3_8B = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288}
QWEN3_8B |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
MISTRAL_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


def test_llama31_8b():
    size = size_of(LLAMA31_8B)
    assert size.num_parameters == 8_030_261_248
    assert size.kv_bytes_per_token == 131_072
    assert size.weight_bytes == 2 * size.num_parameters
    one_block = size.num_parameters - size_with_blocks(LLAMA31_8B, 31).num_parameters
    assert one_block == 218_112_000


@pytest.mark.parametrize(
    ("removed", "billions", "parameters", "flops"),
    [
        (2, 7.594, -5.43, -5.81),
        (4, 7.158, None, None),
        (6, 6.722, -16.30, -17.44),
        (8, 6.285, None, None),
        (10, 5.849, None, None),
        (16, 4.540, -43.46, -46.50),
    ],
)
def test_llama31_8b_pruned(removed, billions, parameters, flops):
    full, pruned = size_of(LLAMA31_8B), size_with_blocks(LLAMA31_8B, 32 - removed)
    assert round(pruned.num_parameters / 1e9, 3) == billions
    assert pruned.num_blocks == 32 - removed
    if parameters is not None:
        change = 100 * (pruned.num_parameters / full.num_parameters - 1)
        assert round(change, 2) == parameters
        assert round(100 * (pruned.matmul_flops_per_token / full.matmul_flops_per_token - 1), 2) == flops
    if removed == 6:
        assert pruned.kv_bytes_per_token == 106_496


def test_other_published_counts():
    assert size_of(QWEN3_8B).num_parameters == 8_190_735_360
    assert size_of(MISTRAL_7B).num_parameters == 7_241_732_096


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_equal_torch(family, tied):
    model = tiny.build_model(family, num_blocks=3, tied=tied)
    size = size_of(model.config.to_dict())
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.weight_bytes == 4 * size.num_parameters
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert size.matmul_flops_per_token == 2 * sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kv_bytes_equal_a_real_cache(family):
    model = tiny.build_model(family, num_blocks=3)
    cache = model(input_ids=torch.arange(5)[None]).past_key_values
    held = sum(kept.keys.nbytes + kept.values.nbytes for kept in cache.layers)
    assert size_of(model.config.to_dict()).kv_bytes_per_token == held / 5


def test_dtypes():
    absent = {name: value for name, value in LLAMA31_8B.items() if name != "torch_dtype"}
    assert size_of(absent).weight_bytes == 4 * size_of(absent).num_parameters
    assert size_of(absent, dtype="bfloat16") == size_of(LLAMA31_8B)
    assert size_of({**absent, "dtype": "float16"}) == size_of(LLAMA31_8B)
    with pytest.raises(ModelError, match="int3"):
        size_of(LLAMA31_8B, dtype="int3")


def test_light():
    """Sizes and plans serve `sdft explain`: no torch, no transformers."""
    code = (
        "import sys, sdft_ray.models.size, sdft_ray.models.config, sdft_ray.models.checkpoint, "
        "sdft_ray.models.surgery, sdft_ray.pruning.plan; "
        "sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
