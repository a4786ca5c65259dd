"""Gradients in bfloat16: summed in float32 as they come, and gone."""

from __future__ import annotations

import torch
from torch import nn

from sdft_ray.training.weights import Weights


def test_gradients_are_moved_into_float32_one_by_one_and_left_alone_afterwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    inputs = torch.randn(5, 4)
    expected = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).bfloat16()
    expected.load_state_dict(model.state_dict())
    weights = Weights(model, "bf16")
    waiting: list[int] = []
    for param in model.parameters():  # after the hooks of the weights
        param.register_post_accumulate_grad_hook(
            lambda _: waiting.append(sum(p.grad is not None for p in model.parameters()))
        )
    for _ in range(2):
        model(inputs.bfloat16()).sum().backward()
    expected(inputs.bfloat16()).sum().backward()
    assert waiting == [0] * 8
    for name, param in expected.named_parameters():
        assert param.grad is not None
        assert torch.equal(weights.masters[name].grad, 2 * param.grad.float()), name  # type: ignore[arg-type]
    weights.restore()
    model(inputs).sum().backward()
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in model.parameters())
