"""Divergences against TRL 1.16's `GKDTrainer.generalized_jsd_loss`, whose figures lie in `trl_generalized_jsd.json`.

TRL is no dependency. To make the figures again, with TRL in the environment:

    python -m tests.numerics.test_divergences_trl
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.training.divergences import forward_kl, jensen_shannon, reverse_kl

GOLDEN = Path(__file__).with_name("trl_generalized_jsd.json")
NUM_TOKENS, VOCAB = 7, 53


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """The same everywhere, without a random number."""
    steps = torch.arange(NUM_TOKENS * VOCAB, dtype=torch.float64)
    student, teacher = 4 * torch.sin(steps), 4 * torch.cos(1.7 * steps)
    return student.reshape(NUM_TOKENS, VOCAB).float(), teacher.reshape(NUM_TOKENS, VOCAB).float()


def cases() -> list[dict[str, float]]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "case", cases(), ids=lambda case: f"beta {case['beta']:g}, temperature {case['temperature']:g}"
)
def test_loss_and_gradient_are_those_of_trl(case: dict[str, float]) -> None:
    """TRL leaves out the factor temperature^2, and takes beta 0 and 1 for the forward and the reverse KL."""
    student, teacher = logits()
    student.requires_grad_()
    beta, temperature = case["beta"], case["temperature"]
    if beta == 0:
        loss = forward_kl(student, teacher, temperature)
    elif beta == 1:
        loss = reverse_kl(student, teacher, temperature)
    else:
        loss = jensen_shannon(student, teacher, temperature, beta)
    loss = loss / temperature**2
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert gradient.norm().item() == pytest.approx(case["gradient_norm"], rel=1e-5)


def write() -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore[reportMissingImports]

    trl: Any = GKDTrainer
    found = []
    for beta, temperature in product((0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.0)):
        student, teacher = logits()
        student.requires_grad_()
        loss = trl.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, student)
        norm = gradient.norm().item()
        found.append({"beta": beta, "temperature": temperature, "loss": loss.item(), "gradient_norm": norm})
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
