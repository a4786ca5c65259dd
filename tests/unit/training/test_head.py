"""The streamed head against autograd over all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sdft_ray.training.divergences import forward_kl
from sdft_ray.training.head import head_loss

NUM_TOKENS, HIDDEN, VOCAB = 23, 16, 50


def problem(*, bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, nn.Linear, Any]:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    hidden_ND = torch.randn(NUM_TOKENS, HIDDEN).to(dtype).requires_grad_()
    targets_N = torch.randint(VOCAB, (NUM_TOKENS,))
    teacher_NV = torch.randn(NUM_TOKENS, VOCAB)

    def loss_of(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        told = F.cross_entropy(logits_CV, targets_N[chunk], reduction="sum")
        return told + 0.5 * forward_kl(logits_CV, teacher_NV[chunk])

    return hidden_ND, head, loss_of


def gradients(hidden_ND: torch.Tensor, head: nn.Linear, loss: torch.Tensor) -> list[torch.Tensor]:
    wanted = [hidden_ND, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(3 * loss, wanted))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 22])
def test_values_and_gradients_are_those_of_autograd(bias: bool, chunk_tokens: int) -> None:
    hidden_ND, head, loss_of = problem(bias=bias)
    whole = loss_of(F.linear(hidden_ND, head.weight, head.bias), slice(0, NUM_TOKENS))
    streamed = head_loss(hidden_ND, head, loss_of, max_logits=chunk_tokens * VOCAB)
    torch.testing.assert_close(streamed, whole)
    for found, expected in zip(gradients(hidden_ND, head, streamed), gradients(hidden_ND, head, whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_ND, head, loss_of = problem(bias=False)
    head.requires_grad_(False)
    loss = head_loss(hidden_ND, head, loss_of, max_logits=4 * VOCAB)
    loss.backward()
    assert head.weight.grad is None
    assert hidden_ND.grad is not None


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """Gradients of 23 chunks differ from float32 ones by rounding of one sum, not of 23."""
    hidden_ND, head, loss_of = problem(bias=False, dtype=torch.bfloat16)
    found = gradients(hidden_ND, head, head_loss(hidden_ND, head, loss_of, max_logits=VOCAB))[1]
    exact = problem(bias=False)
    with torch.no_grad():
        exact[0].copy_(hidden_ND)
        exact[1].weight.copy_(head.weight)
    expected = gradients(exact[0], exact[1], exact[2](F.linear(exact[0], exact[1].weight), slice(0, NUM_TOKENS)))[1]
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.01
