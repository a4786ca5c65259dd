"""Loads the output head of a checkpoint, without the rest of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from sdft_ray.models.checkpoint import Checkpoint


def load_head(directory: str | Path, dtype: str) -> tuple[nn.Linear, float | None]:
    """The frozen linear map from hidden states (after the final norm) to logits, and the logit cap (Gemma 2) or None.

    A tied head is the embedding table. Weights are in `dtype`, on the CPU. Raises `ModelError` if the checkpoint is
    damaged.
    """
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_tensors()
    names = {tensor.role: tensor.name for tensor in checkpoint.family.templates(checkpoint.config)}
    weight_VD = checkpoint.read(names.get("head", names["embedding"])).to(getattr(torch, dtype))
    head = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight_VD, requires_grad=False)
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    return head, getattr(config.get_text_config(), "final_logit_softcapping", None)
