"""A loss on top of the output head, without ever holding the logits of more than a few tokens.

Logits are the largest tensor of training: 4,096 tokens of a vocabulary of 128k take 2 GiB in float32, and again as
much for each intermediate. Here tokens go through the head in chunks, and each chunk's gradient is taken at once, so
that nothing but gradients outlives it (as in Liger's fused head, arXiv:2410.10989, for any loss).

Suffixes: N tokens, C tokens of a chunk, D hidden channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

ChunkLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""From the logits (C, V) in float32 of the tokens in a slice of N to the sum of their losses."""

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits held at once by device: 32 MiB and 256 MiB in float32. A GPU wants larger matrices."""


def head_loss(
    hidden_ND: torch.Tensor,
    head: torch.nn.Module,
    loss_of: ChunkLoss,
    *,
    max_logits: int | None = None,
) -> torch.Tensor:
    """Sum of `loss_of` over chunks of the N tokens, a float32 scalar whose gradient reaches hidden states and head.

    `head` is a linear map (`weight` (V, D), perhaps a `bias`); a frozen one gets no gradient. What `loss_of` closes
    over gets none either. Where all logits fit, autograd does it in one go.
    """
    weight_VD: Any = head.weight
    bias_V: Any = getattr(head, "bias", None)
    chunk_tokens = max(1, (max_logits or MAX_LOGITS[hidden_ND.device.type]) // weight_VD.shape[0])
    if len(hidden_ND) <= chunk_tokens:
        return loss_of(F.linear(hidden_ND, weight_VD, bias_V).float(), slice(0, len(hidden_ND)))
    total: Any = _Streamed.apply(hidden_ND, weight_VD, bias_V, loss_of, chunk_tokens)
    return total


class _Streamed(torch.autograd.Function):
    """Forward already computes the gradients, chunk by chunk; backward scales them."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        loss_of: ChunkLoss,
        chunk_tokens: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        # Sums over chunks are kept in float32: in bfloat16 the later ones would be lost.
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for start in range(0, len(hidden_ND), chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, len(hidden_ND)))
            hidden_CD = hidden_ND[chunk]
            loss, d_logits_CV = _loss_and_gradient(hidden_CD, weight_VD, bias_V, loss_of, chunk)
            total += loss
            if d_hidden_ND is not None:
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_ND[chunk])
            if d_weight_VD is not None:
                _add_product(d_weight_VD, d_logits_CV.T, hidden_CD)
            if d_bias_V is not None:
                d_bias_V += d_logits_CV.sum(0)
        ctx.gradients = (d_hidden_ND, d_weight_VD, d_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [
            None if gradient is None else gradient.mul_(d_total).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *gradients, None, None


def _loss_and_gradient(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    loss_of: ChunkLoss,
    chunk: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of a chunk, and its gradient by the logits in the dtype of the hidden states."""
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(logits_CV, chunk)
    (d_logits_CV,) = torch.autograd.grad(loss, logits_CV)
    return loss.detach(), d_logits_CV.to(hidden_CD.dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
