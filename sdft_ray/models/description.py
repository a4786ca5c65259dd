"""A model without its weights: its config and what follows from it, computed once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sdft_ray.models.families import Config, Family, family_of
from sdft_ray.models.size import ModelSize, size_of
from sdft_ray.models.source import ModelSource, read_config

UNLIMITED_TOKENS = 1 << 30
"""Context of a model whose config names none."""


@dataclass(frozen=True)
class ModelDescription:
    """A `config.json` with its family and sizes. Properties raise `ModelError` for an unsupported model."""

    config: Config

    @classmethod
    def of(cls, directory: Path) -> ModelDescription:
        """Of a checkpoint on disk. Raises `ModelError` where it has no readable config."""
        config = read_config(ModelSource(directory=str(directory)), None)
        assert config is not None, "a directory without a config is an error"
        return cls(config)

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def size(self) -> ModelSize:
        """In the dtype of the config."""
        return size_of(self.config)

    @property
    def context_tokens(self) -> int:
        """Most tokens of a sequence."""
        return self.config.get("max_position_embeddings", UNLIMITED_TOKENS)
