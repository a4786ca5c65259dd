"""Settings of an inference engine: memory, batch size, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdft_ray.recipe.yaml_model import StrictPart


class EngineSettings(StrictPart):
    """How an engine runs. None of them changes answers, up to rounding."""

    kind: Literal["vllm", "transformers"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations; `auto`: what is faster on the hardware and no less exact than the
    checkpoint."""
    max_model_tokens: int | None = Field(default=None, ge=8)
    """Context length: tokens of prompt and answer together. None: the model's maximum."""
    max_sequences: int = Field(default=64, ge=1)
    """Maximum number of sequences in a batch."""
    kv_cache_bytes: int = Field(default=256 * 2**20, ge=2**20)
    tensor_parallel: int = Field(default=1, ge=1)
    enforce_eager: bool = True
