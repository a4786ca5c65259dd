"""Models small enough that everything a target can make of them is written out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sdft_ray.pruning.plan import resolve_num_removed
from sdft_ray.pruning.target import Candidate, resolve_target
from sdft_ray.pruning.width import resolve_sizes
from sdft_ray.recipe.pruning import Depth, Pruning

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
OPEN = Depth(metric="tail", remove_blocks="target")
NONE_GOES = Depth(metric="explicit", blocks=())
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

Sizes = tuple[int, int, int, int]
"""hidden, mlp, heads, kv_groups."""


def parameters(config: dict[str, Any], num_blocks: int, sizes: Sizes) -> int:
    """Every tensor of the model, one after the other."""
    hidden, mlp, heads, groups = sizes
    head_dim = 8
    block = 2 * hidden * heads * head_dim + 2 * hidden * groups * head_dim + 3 * hidden * mlp + 2 * hidden
    if config["model_type"] == "qwen3":
        block += 2 * head_dim  # norms of queries and keys
    embeddings = 1 if config.get("tie_word_embeddings") else 2
    return embeddings * config["vocab_size"] * hidden + hidden + num_blocks * block


def memory(config: dict[str, Any], num_blocks: int, sizes: Sizes, element_bytes: int, tokens: int) -> int:
    """Weights, and a key and a value of 8 numbers for every token, group and block."""
    return element_bytes * (parameters(config, num_blocks, sizes) + tokens * num_blocks * sizes[3] * 2 * 8)


def whole(config: dict[str, Any]) -> Sizes:
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    hidden, mlp, heads, groups = (config[field] for field in fields)
    return hidden, mlp, heads, groups


def sizes_of(candidate: Candidate) -> Sizes:
    sizes = candidate.sizes
    return sizes["hidden"], sizes["mlp"], sizes["heads"], sizes["kv_groups"]


def widths(config: dict[str, Any], spaces: tuple[str, ...], multiple_of: int = 1) -> Iterator[Sizes]:
    """The whole width, and every one that an even share of the named spaces leaves and that can be loaded."""
    hidden, mlp, heads, groups = whole(config)
    yield hidden, mlp, heads, groups
    for part in range(1, 1024):
        new_hidden = hidden * part // 1024 // multiple_of * multiple_of if "hidden" in spaces else hidden
        new_mlp = mlp * part // 1024 // multiple_of * multiple_of if "mlp" in spaces else mlp
        new_groups = groups * part // 1024 if "kv_groups" in spaces else groups
        if not (new_hidden and new_mlp and new_groups):
            continue
        new_heads = heads // groups * new_groups
        if "heads" in spaces:
            wanted = heads * part // 1024 // new_groups * new_groups
            if not 0 < wanted <= new_heads:
                continue
            new_heads = wanted
        if config["model_type"] == "llama" and new_hidden % new_heads:
            continue
        yield new_hidden, new_mlp, new_heads, new_groups


def amounts_of(asked: Pruning, config: dict[str, Any], dtype: str = "float32") -> tuple[int, Sizes]:
    """Blocks that stay and sizes of the spaces, of the amounts that a target gives."""
    depth, width = resolve_target(asked, config, dtype=dtype)
    assert not depth.is_open
    assert width is None or not width.open_spaces
    sizes = resolve_sizes(width, config)
    narrow = sizes["hidden"], sizes["mlp"], sizes["heads"], sizes["kv_groups"]
    return config["num_hidden_layers"] - resolve_num_removed(depth, config), narrow


def imbalance(config: dict[str, Any], num_blocks: int, sizes: Sizes) -> float:
    def block(of: Sizes) -> int:
        return parameters(config, 2, of) - parameters(config, 1, of)

    return abs(math.log(num_blocks / config["num_hidden_layers"] * block(whole(config)) / block(sizes)))


CASES = [
    (QWEN3, ("mlp",), 1),
    (QWEN3, ("hidden",), 1),
    (QWEN3, ("hidden", "mlp"), 8),
    (QWEN3, ("heads",), 1),
    (QWEN3, ("kv_groups",), 1),
    (QWEN3, ("hidden", "mlp", "heads"), 1),
    (LLAMA, ("hidden",), 1),
    (LLAMA, ("hidden", "mlp", "heads", "kv_groups"), 1),
]
"""Config, open spaces, multiple of which they are."""
