"""Model sizes (parameters, FLOPs, KV cache bytes) from config.json alone, without weights or torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sdft_ray.errors import ModelError
from sdft_ray.models.families import Config, TensorTemplate, family_of, num_blocks_of, shape_of

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model.

    `num_parameters` counts a tied embedding once. `matmul_flops_per_token` is 2 per weight of a matrix product,
    including the output head, tied or not; the embedding lookup counts 0, and attention scores are excluded because
    they depend on the context length. `kv_bytes_per_token` is the size of keys and values of one token over all
    blocks; the cache of a sliding-window block does not grow beyond its window. Bytes are for the dtype of the
    weights.
    """

    num_blocks: int
    num_parameters: int
    matmul_flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


def size_of(config: Config, *, dtype: str | None = None) -> ModelSize:
    """Size of the model with this config in `dtype` (None: that of the config).

    A config without a dtype counts as float32, the default of Hugging Face. Raises `ModelError`
    for an unsupported or incomplete config.
    """
    return size_with_blocks(config, num_blocks_of(config), dtype=dtype)


def size_with_blocks(config: Config, num_blocks: int, *, dtype: str | None = None) -> ModelSize:
    """Size of the same model with another number of blocks, at least 1: all blocks have the same size."""
    assert num_blocks >= 1, "a model has at least one block"
    family = family_of(config)
    spaces = family.space_sizes(config)
    element_bytes = _element_bytes(dtype or config.get("dtype") or config.get("torch_dtype") or "float32")

    def count(tensor: TensorTemplate) -> int:
        return prod(shape_of(tensor, spaces)) * (num_blocks if tensor.per_block else 1)

    templates = list(family.templates(config))
    num_parameters = sum(count(tensor) for tensor in templates)
    block_weights = sum(count(tensor) for tensor in templates if tensor.role == "matmul")
    head_weights = spaces["vocab"] * spaces["hidden"]
    return ModelSize(
        num_blocks=num_blocks,
        num_parameters=num_parameters,
        matmul_flops_per_token=2 * (block_weights + head_weights),
        kv_bytes_per_token=2 * num_blocks * spaces["kv_groups"] * spaces["head_dim"] * element_bytes,
        weight_bytes=num_parameters * element_bytes,
    )


def _element_bytes(dtype: object) -> int:
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"dtype {dtype!r} is not supported", f"use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[str(dtype)]
