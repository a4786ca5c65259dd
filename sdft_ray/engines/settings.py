"""How an engine runs: memory, batch, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdft_ray.recipe.yaml_model import StrictPart


class EngineSettings(StrictPart):
    """Execution alone: the same model answers the same, up to rounding, whatever these say."""

    kind: Literal["vllm", "transformers"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; `auto` takes the checkpoint's."""
    max_model_tokens: int | None = Field(default=None, ge=8)
    """Prompt and answer together; None takes the model's own."""
    max_sequences: int = Field(default=64, ge=1)
    """Answers that are decoded together."""
    kv_cache_bytes: int = Field(default=256 * 2**20, ge=2**20)
    tensor_parallel: int = Field(default=1, ge=1)
    enforce_eager: bool = True
