"""Write a trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdft_ray.models.companions import copy_companions


def save_student(
    model: Any,
    tokenizer_dir: Path,
    directory: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Save `model` as safetensors in `directory`, with the other files that belong to it (`models.companions`).

    `tokenizer_dir` is the checkpoint that the student started from. `dtype` (`bfloat16`, `float16`, `float32`)
    converts the parameters in place first; None keeps theirs. Adapters must be merged before.
    """
    assert not hasattr(model, "merge_and_unload"), "merge the adapters first: training.lora.merged"
    if dtype is not None:
        for param in model.parameters():  # not model.to(): rotary frequencies are buffers and stay float32
            param.data = param.data.to(getattr(torch, dtype))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=max_shard_bytes)
    copy_companions(Path(tokenizer_dir), directory)
