"""Output heads that config.json ties to the embedding table, as they are found: absent, copied, stored apart, alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from sdft_ray.models.families import Config, family_of

if TYPE_CHECKING:
    from sdft_ray.models.checkpoint import TensorInfo

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK_BYTES = 2**20


def is_tied(config: Config) -> bool:
    """Whether config.json says that the head is the embedding table."""
    return bool(family_of(config).setting(config, "tie_word_embeddings"))


def resolve_tied_head(config: Config, tensors: Mapping[str, TensorInfo]) -> tuple[Config, Mapping[str, TensorInfo]]:
    """Config and tensors in agreement, as transformers and vLLM take them.

    A head with other values than the embedding table is used, whatever the config says: it becomes an untied one. A
    head without an embedding table is that table.
    """
    if HEAD not in tensors or not is_tied(config):
        return config, tensors
    if EMBEDDING not in tensors:
        return config, {EMBEDDING if name == HEAD else name: info for name, info in tensors.items()}
    if _is_copy(tensors[HEAD], tensors[EMBEDDING]):
        return config, tensors
    return {**config, "tie_word_embeddings": False}, tensors


def _is_copy(head: TensorInfo, embedding: TensorInfo) -> bool:
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    return _is_same(head, embedding, *(info.file.stat().st_mtime_ns for info in (head, embedding)))


@lru_cache(maxsize=16)
def _is_same(first: TensorInfo, second: TensorInfo, *_changed: int) -> bool:
    """Whether the bytes are equal; read once, as long as the files do not change."""
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        for start in range(0, first.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, first.nbytes - start)
            if one.read(size) != other.read(size):
                return False
    return True
