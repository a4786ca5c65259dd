"""How far a student's next-token distributions lie from a teacher's, in nats, summed over tokens.

All take float32 logits and sum over the N tokens, so that a caller divides once by the tokens of the whole step.
With a temperature tau both distributions are softmax(logits / tau) and the sum is multiplied by tau^2, which keeps
the size of the gradient (Hinton et al., arXiv:1503.02531, section 2).

Suffixes: N tokens, V vocabulary, K tokens kept of a teacher's distribution.
"""

from __future__ import annotations

import torch


def forward_kl(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """tau^2 KL(teacher || student): the student must cover whatever the teacher may say."""
    student_NV, teacher_NV = _log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(teacher_NV, student_NV)


def reverse_kl(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """tau^2 KL(student || teacher): the student must not say what the teacher would not."""
    student_NV, teacher_NV = _log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return temperature**2 * _kl(student_NV, teacher_NV)


def jensen_shannon(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """tau^2 (beta KL(teacher || m) + (1 - beta) KL(student || m)), m = beta teacher + (1 - beta) student.

    The generalised Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649, equation 1), `beta` in (0, 1).
    Divided by beta it tends to the forward KL as beta falls to 0; divided by 1 - beta to the reverse KL as it rises
    to 1.
    """
    student_NV, teacher_NV = _log_probs(student_logits_NV, teacher_logits_NV, temperature)
    shares = torch.tensor([beta, 1 - beta], device=student_NV.device, dtype=student_NV.dtype).log()
    mixture_NV = torch.logaddexp(teacher_NV + shares[0], student_NV + shares[1])
    return temperature**2 * (beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_NV, mixture_NV))


def top_k_kl(
    student_logits_NV: torch.Tensor,
    top_ids_NK: torch.Tensor,
    top_logprobs_NK: torch.Tensor,
    tail_N: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher || student) over K + 1 outcomes: each token kept, and one for all the others together.

    `top_ids_NK` int64, `top_logprobs_NK` and `tail_N` as in `data.signals.TopLogprobs`: -inf where a token cannot
    come, or where there are no others. Never above the full KL (merging outcomes cannot add information), and equal
    to it when K is V. Only for temperature 1: the tail's mass at another is not known.
    """
    normalizer_N = student_logits_NV.logsumexp(-1)
    student_NK = student_logits_NV.gather(-1, top_ids_NK) - normalizer_N[:, None]
    divergence = _terms(top_logprobs_NK, student_NK).sum()
    if top_ids_NK.shape[-1] == student_logits_NV.shape[-1]:
        return divergence
    # Of the others' own logits: 1 minus the mass of the kept ones would be all rounding where it is small.
    others_N = student_logits_NV.scatter(-1, top_ids_NK, -torch.inf).logsumexp(-1) - normalizer_N
    return divergence + _terms(tail_N, others_N).sum()


def _terms(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """p (log p - log q), 0 where p is 0 whatever q is."""
    possible = torch.isfinite(teacher)
    difference = torch.where(possible, teacher, 0) - torch.where(possible, student, 0)
    return torch.where(possible, teacher.exp() * difference, 0)


def _log_probs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of p (log p - log q), both given as logarithms; logits of a whole vocabulary are large, so few copies.

    As products of whole tensors, which need no room for p (log p - log q) itself.
    """
    p, q = p.flatten(), q.flatten()
    share = p.exp()
    return torch.dot(share, p) - torch.dot(share, q)
