"""Write a trained model as an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.errors import ModelError
from sdft_ray.models.companions import copy_companions
from sdft_ray.models.generation_config import add_end_ids


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
    converts the parameters in place first; None keeps theirs. Adapters must be merged before. The token that ends an
    answer in the chat template is among the `eos_token_id` of generation_config.json, so that any engine stops there.
    """
    assert not hasattr(model, "merge_and_unload"), "merge the adapters first: training.lora.merged"
    if dtype is not None:
        for param in model.parameters():  # not model.to(): rotary frequencies are buffers and stay float32
            param.data = param.data.to(getattr(torch, dtype))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Its own is copied below: transformers refuses to save some that models are published with.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(directory, max_shard_size=max_shard_bytes)
    copy_companions(Path(tokenizer_dir), directory)
    _name_end(directory)


def _name_end(directory: Path) -> None:
    """Add the end of turn, which the student has learnt, to the tokens that end generation."""
    try:
        end_id = ChatFormat(load_tokenizer(directory)).end_ids[-1]
    except ModelError:  # no tokenizer or no usable template: nothing was trained on turns
        return
    add_end_ids(directory, [end_id])
