"""Loads checkpoints into stock transformers: safetensors only, local files only, no remote code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.families import Config, family_of
from sdft_ray.models.size import DTYPE_BYTES

_PROBE_TOKENS = 16


def load_model(directory: str | Path, dtype: str | torch.dtype, *, attn: str = "sdpa") -> PreTrainedModel:
    """The causal language model in `directory`, in eval mode on the CPU, with weights in `dtype`.

    `dtype` is `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint; `attn` is an attention
    implementation of transformers. If attention scores are capped, as in Gemma 2, `sdpa` is replaced by `eager`,
    because it silently ignores the cap. Raises `ModelError` if the checkpoint is damaged or unsupported, or if any
    weight would be left at its initial value.
    """
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPE_BYTES:
        raise ModelError(f"dtype {name!r} is not supported", f"use auto or one of {', '.join(DTYPE_BYTES)}")
    Checkpoint.open(directory).check_tensors()
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype="auto" if name == "auto" else getattr(torch, name),
            attn_implementation=attn,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    unset = [*report["missing_keys"], *report["mismatched_keys"]]
    if unset:
        raise ModelError(f"{directory}: {unset[0]} was not loaded", "config.json and weights must fit each other")
    if attn == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model.eval()


def write_random(config: Config, directory: Path, dtype: str) -> None:
    """Write a checkpoint of this config with random initial weights in `dtype`, for speed measurements."""
    with quiet():
        random_model(config, dtype).save_pretrained(str(directory))


def random_model(config: Config, dtype: str) -> PreTrainedModel:
    """A model of this config with random initial weights in `dtype`, in eval mode on the CPU, for measurements."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        loaded = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(loaded, dtype=getattr(torch, dtype)).eval()


def check_config(config: Config, name: str, hint: str) -> None:
    """Build the model of this config without memory for its weights, as stock transformers does.

    Raises `ModelError` about the model called `name`, with `hint`, unless that succeeds with the tensors that the table
    of its family has.
    """
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.device("meta"):
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            loaded = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            built = AutoModelForCausalLM.from_config(loaded).state_dict()
        except Exception as reason:  # noqa: BLE001  (each field of each family has a check with an error of its own)
            lines = str(reason).strip().splitlines() or [type(reason).__name__]
            raise ModelError(f"transformers refuses the config of {name}: {lines[-1].strip()}", hint) from None
    for tensor, shape in family_of(config).tensor_shapes(config).items():
        found = tuple(built[tensor].shape) if tensor in built else None
        if found != shape:
            has = f"with the shape {list(found)}" if found else "not at all"
            message = f"{name} would have {tensor} of shape {list(shape)}, but transformers builds it {has}"
            raise ModelError(message, hint)


@torch.inference_mode()
def check_finite(directory: str | Path, *, dtype: str | torch.dtype = "auto") -> None:
    """Run a few tokens through the model in `directory`. Raises `ModelError` unless every logit is finite.

    What stock transformers cannot build is refused first (`check_config`).
    """
    hint = "choose other sizes in depth and width"
    check_config(Checkpoint.open(directory).config, f"the model in {directory}", hint)
    model = load_model(directory, dtype)
    num_ids = model.config.get_text_config().vocab_size
    input_ids_BT = torch.arange(_PROBE_TOKENS)[None] * 7919 % num_ids  # a prime: spreads over the vocabulary
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
    if not bool(torch.isfinite(logits_BTV).all()):
        raise ModelError(
            f"{directory} gives logits that are not finite", "check the weights, or use bfloat16 or float32"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bar of transformers within the block."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()
