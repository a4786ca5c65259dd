"""The sizes of a model that memory is computed from, out of its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sdft_ray.models.description import ModelDescription
from sdft_ray.models.families import Config, family_of, num_blocks_of, shape_of
from sdft_ray.models.size import DTYPE_BYTES, size_of


@dataclass(frozen=True)
class ModelShape:
    """Counts, not bytes. `query` and `key` are channels of all query heads and of all key heads, `num_norms` the norms
    of a block over hidden channels, `is_capped` whether attention scores are capped (Gemma 2), `has_windows` whether
    some blocks see a window of the context only.
    """

    num_blocks: int
    num_parameters: int
    block_parameters: int
    """Of one block."""
    hidden: int
    mlp: int
    num_heads: int
    query: int
    key: int
    vocab: int
    context_tokens: int
    num_norms: int = 2
    is_tied: bool = True
    is_capped: bool = False
    has_windows: bool = False
    stored_bytes: int = 2
    """Bytes of a weight in the checkpoint."""

    @classmethod
    def of(cls, config: Config) -> ModelShape:
        """Raises `ModelError` for an unsupported or incomplete config."""
        family, sizes = family_of(config), family_of(config).space_sizes(config)
        templates = [tensor for tensor in family.templates(config) if tensor.per_block]
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return cls(
            num_blocks=num_blocks_of(config),
            num_parameters=size_of(config).num_parameters,
            block_parameters=sum(prod(shape_of(tensor, sizes)) for tensor in templates),
            hidden=sizes["hidden"],
            mlp=sizes["mlp"],
            num_heads=sizes["heads"],
            query=sizes["heads"] * sizes["head_dim"],
            key=sizes["kv_groups"] * sizes["head_dim"],
            vocab=sizes["vocab"],
            context_tokens=ModelDescription(config).context_tokens,
            num_norms=sum(tensor.role == "norm" and tensor.axes == (("hidden",),) for tensor in templates),
            is_tied=bool(family.setting(config, "tie_word_embeddings")),
            is_capped=config.get("attn_logit_softcapping") is not None,
            has_windows=bool(config.get("sliding_window")) and family.sliding != "none",
            stored_bytes=DTYPE_BYTES[str(dtype)],
        )

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Keys and values of one token over all blocks, as if no block had a window."""
        return 2 * self.num_blocks * self.key * dtype_bytes

    def weight_bytes(self, dtype_bytes: int) -> int:
        return self.num_parameters * dtype_bytes

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden


def dtype_bytes(dtype: str, shape: ModelShape) -> int:
    """Bytes of a weight in `dtype`; `auto` is the dtype of the checkpoint."""
    return shape.stored_bytes if dtype == "auto" else DTYPE_BYTES[dtype]
