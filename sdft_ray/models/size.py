"""How large a model is, from its config.json alone: no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sdft_ray.errors import ModelError
from sdft_ray.models.families import Config, TensorTemplate, family_of, num_blocks_of, shape_of

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model.

    `num_parameters` counts a tied embedding once. `matmul_flops_per_token` is two for every weight that a
    token is multiplied with, the output head included, whether tied or not; the embedding lookup costs
    nothing, and attention scores are left out because they depend on the length of the context.
    `kv_bytes_per_token` is keys and values of one token over all blocks; a sliding-window block stops growing
    at its window. Bytes are for the dtype of the weights.
    """

    num_blocks: int
    num_parameters: int
    matmul_flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


def size_of(config: Config, *, dtype: str | None = None) -> ModelSize:
    """Size of the model that a config describes, held in `dtype` (the config's own when None).

    A config without a dtype counts as float32, which is what Hugging Face writes then. Raises `ModelError`
    for an unsupported or incomplete config.
    """
    return size_with_blocks(config, num_blocks_of(config), dtype=dtype)


def size_with_blocks(config: Config, num_blocks: int, *, dtype: str | None = None) -> ModelSize:
    """Size of the same model with another number of blocks, at least 1: blocks are all alike."""
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
