"""The output head: from hidden states to the loss of each token, and as loaded without the rest of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoConfig

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits in memory at once, by device: 32 MiB and 256 MiB in float32, and three times that during the loss."""


@dataclass(frozen=True)
class OutputHead:
    """From hidden states after the final norm to losses: LM head, and the cap of the logits (Gemma 2) or None.

    Logits of `chunk_tokens` tokens are in memory at once.
    """

    linear: nn.Module
    softcap: float | None
    chunk_tokens: int

    @classmethod
    def of(cls, model: nn.Module, max_logits: int | None = None) -> OutputHead:
        """The head of a transformers causal LM; `max_logits`: see `MAX_LOGITS`. Raises `ModelError` without one."""
        backbone = getattr(model, "base_model", model)
        linear = None if backbone is model else cast(Any, model).get_output_embeddings()
        if linear is None:
            raise ModelError(f"{type(model).__name__} has no LM head", "load the causal language model, not its base")
        weight_VD = linear.weight
        max_logits = max_logits or MAX_LOGITS.get(weight_VD.device.type, MAX_LOGITS["cpu"])
        config = cast(Any, backbone).config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(linear, softcap, max(1, max_logits // len(weight_VD)))

    def token_losses(self, hidden_ND: Tensor, targets_N: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Cross-entropy of every target, (N,) float64 in nats; `norm`: the final norm, where it is still to come.

        Logits are float32 (float64 stays), whatever the dtype of the model.
        """
        losses = [hidden_ND.new_zeros(0, dtype=torch.float64)]
        chunks = zip(hidden_ND.split(self.chunk_tokens), targets_N.split(self.chunk_tokens), strict=True)
        for hidden_CD, targets_C in chunks:
            logits_CV = self.logits(hidden_CD if norm is None else norm(hidden_CD))
            losses.append(F.cross_entropy(logits_CV, targets_C, reduction="none").double())
        return torch.cat(losses)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V) logits of all tokens at once, in float32 (float64 stays)."""
        logits_CV = self.linear(hidden_CD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        return logits_CV if self.softcap is None else torch.tanh(logits_CV / self.softcap) * self.softcap


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
