"""Divergences against closed forms, torch's own, and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from sdft_ray.training.divergences import forward_kl, jensen_shannon, reverse_kl, top_k_kl

NUM_TOKENS, VOCAB = 6, 40


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, NUM_TOKENS, VOCAB, generator=generator) * 3
    return student, teacher


def torch_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    return kl_divergence(Categorical(logits=p_logits.double()), Categorical(logits=q_logits.double())).sum().float()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_directions_equal_torch_distributions(logits: tuple[torch.Tensor, ...], temperature: float) -> None:
    student, teacher = logits
    cooled = student / temperature, teacher / temperature
    expected = temperature**2 * torch_kl(cooled[1], cooled[0])
    torch.testing.assert_close(forward_kl(student, teacher, temperature), expected, rtol=1e-5, atol=1e-5)
    expected = temperature**2 * torch_kl(cooled[0], cooled[1])
    torch.testing.assert_close(reverse_kl(student, teacher, temperature), expected, rtol=1e-5, atol=1e-5)


def test_closed_form_of_two_outcomes() -> None:
    """KL between coins of 1/2 and 1/4: ln 2 / 2 + ln(2/3) / 2."""
    fair, bent = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert forward_kl(bent, fair).item() == pytest.approx(expected, abs=1e-6)
    assert reverse_kl(fair, bent).item() == pytest.approx(expected, abs=1e-6)
    middle = [(0.5 + 0.25) / 2, (0.5 + 0.75) / 2]
    halves = [
        0.5 * sum(p * math.log(p / m) for p, m in zip(coin, middle, strict=True)) for coin in ([0.5, 0.5], [0.25, 0.75])
    ]
    assert jensen_shannon(bent, fair).item() == pytest.approx(sum(halves), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_from_its_mixture(logits: tuple[torch.Tensor, ...], beta: float) -> None:
    student, teacher = logits
    mixture = (beta * teacher.softmax(-1) + (1 - beta) * student.softmax(-1)).log()
    expected = beta * torch_kl(teacher, mixture) + (1 - beta) * torch_kl(student, mixture)
    torch.testing.assert_close(jensen_shannon(student, teacher, 1.0, beta), expected, rtol=1e-5, atol=1e-5)


def test_jensen_shannon_tends_to_the_kl_of_either_side(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher = (part.double() for part in logits)
    near = 1e-8
    for beta, expected in ((near, forward_kl), (1 - near, reverse_kl)):
        found = jensen_shannon(student, teacher, 1.0, beta) / near
        assert found.item() == pytest.approx(expected(student, teacher).item(), rel=1e-2)


def top(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs_NK, ids_NK = teacher.log_softmax(-1).topk(k)
    left_N = 1 - logprobs_NK.double().exp().sum(-1)
    tail_N = left_N.clamp_min(0).log().float() if k < teacher.shape[-1] else torch.full((len(teacher),), -torch.inf)
    return ids_NK, logprobs_NK, tail_N


def test_top_k_grows_to_the_full_divergence(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher = logits
    full = forward_kl(student, teacher).item()
    found = [top_k_kl(student, *top(teacher, k)).item() for k in (1, 2, 4, 8, 16, 32, VOCAB)]
    assert found == sorted(found)
    assert found[0] < 0.9 * full
    assert found[-1] == pytest.approx(full, rel=1e-5)


def test_top_k_of_two_outcomes_and_the_rest(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher = logits
    ids, logprobs, tail = top(teacher, 2)
    expected = 0.0
    for n in range(NUM_TOKENS):
        p, q = teacher[n].double().softmax(-1), student[n].double().softmax(-1)
        kept = ids[n].tolist()
        outcomes = [(p[i].item(), q[i].item()) for i in kept]
        outcomes.append((1 - sum(a for a, _ in outcomes), 1 - sum(b for _, b in outcomes)))
        expected += sum(a * math.log(a / b) for a, b in outcomes)
    assert top_k_kl(student, ids, logprobs, tail).item() == pytest.approx(expected, rel=1e-5)


def test_impossible_tokens_cost_nothing_and_spoil_no_gradient() -> None:
    student = torch.tensor([[0.3, -0.2, 1.0, 0.5]], requires_grad=True)
    logprobs = torch.tensor([[math.log(0.6), math.log(0.4), -math.inf]])
    loss = top_k_kl(student, torch.tensor([[0, 2, 3]]), logprobs, torch.tensor([-math.inf]))
    q = student.detach().softmax(-1)[0]
    expected = 0.6 * math.log(0.6 / q[0]) + 0.4 * math.log(0.4 / q[2])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[0], q - torch.tensor([0.6, 0.0, 0.4, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, jensen_shannon])
def test_nothing_between_equals(function: Any, logits: tuple[torch.Tensor, ...]) -> None:
    assert abs(function(logits[0], logits[0]).item()) < 1e-5


CLOSE = {
    "forward": (forward_kl, lambda s, t: (t.exp() * (t - s)).sum()),
    "reverse": (reverse_kl, lambda s, t: (s.exp() * (s - t)).sum()),
    "both": (
        jensen_shannon,
        lambda s, t: sum(0.5 * (p.exp() * (p - torch.logaddexp(s, t) + math.log(2))).sum() for p in (s, t)),
    ),
}


@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-3, 1e-4])
def test_values_of_close_distributions(name: str, distance: float) -> None:
    """A vocabulary of real size, confident logits, and a student that hardly differs: 1e-9 nats at the nearest."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(24, 20_000, generator=generator) * 4 - 20
    student = (teacher + distance * torch.randn(24, 20_000, generator=generator)).requires_grad_()
    divergence, formula = CLOSE[name]
    expected = formula(student.detach().double().log_softmax(-1), teacher.double().log_softmax(-1)).item()
    with torch.no_grad():
        assert divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    loss = divergence(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gradients_are_those_of_float32(logits: tuple[torch.Tensor, ...]) -> None:
    student, teacher = logits[0].requires_grad_(), logits[1]
    p, q = teacher.log_softmax(-1).flatten(), student.log_softmax(-1).flatten()
    (expected,) = torch.autograd.grad(torch.dot(p.exp(), p) - torch.dot(p.exp(), q), student)
    (found,) = torch.autograd.grad(forward_kl(student, teacher), student)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [4, VOCAB])
def test_top_k_of_a_student_that_is_the_teacher(k: int, logits: tuple[torch.Tensor, ...]) -> None:
    """The teacher's rounded log-probabilities do not add up to 1, which is no distance."""
    ids, logprobs, tail = top(logits[1], k)
    found = top_k_kl(logits[1], ids, logprobs + 1e-3 * torch.randn(logprobs.shape), tail).item()
    assert 0 <= found < NUM_TOKENS * 1e-5
    nowhere = torch.full_like(logprobs, -math.inf), torch.full_like(tail, -math.inf)
    assert top_k_kl(logits[1], ids, *nowhere).item() == 0
