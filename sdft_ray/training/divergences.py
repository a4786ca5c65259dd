"""How far a student's next-token distributions lie from a teacher's, in nats, summed over tokens.

Values are computed in float64, a few tokens at a time: in float32 the difference of two close distributions is mostly
rounding (a relative error of 1e-2 at 1e-4 nats per token). Gradients are computed in float32. All take float32 logits
and sum over the N tokens, so that a caller divides once by the tokens of the whole step.
With a temperature tau both distributions are softmax(logits / tau) and the sum is multiplied by tau^2, which keeps
the size of the gradient (Hinton et al., arXiv:1503.02531, section 2).

Suffixes: N tokens, V vocabulary, K tokens kept of a teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdft_ray.training.sums import with_value

_WIDE_LOGITS = {"cpu": 2**17, "cuda": 2**24}
"""Logits of either side in float64 at once, by device: 1 MiB and 128 MiB."""


def forward_kl(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """tau^2 KL(teacher || student): the student must cover whatever the teacher may say."""
    return _divergence(
        lambda student, teacher: _kl(teacher, student), student_logits_NV, teacher_logits_NV, temperature
    )


def reverse_kl(
    student_logits_NV: torch.Tensor, teacher_logits_NV: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """tau^2 KL(student || teacher): the student must not say what the teacher would not."""
    return _divergence(_kl, student_logits_NV, teacher_logits_NV, temperature)


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

    def of_log_probs(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
        shares = torch.tensor([beta, 1 - beta], device=student_NV.device, dtype=student_NV.dtype).log()
        mixture_NV = torch.logaddexp(teacher_NV + shares[0], student_NV + shares[1])
        return beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_NV, mixture_NV)

    return _divergence(of_log_probs, student_logits_NV, teacher_logits_NV, temperature)


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

    What a teacher's rounded probabilities lack in 1 is added, which is the sum of q - p: then a student that equals the
    teacher is at its minimum, about 0, and rounding counts in second order only.
    """
    teacher = top_ids_NK, top_logprobs_NK, tail_N
    with torch.no_grad():
        value = torch.zeros((), dtype=torch.float64, device=student_logits_NV.device)
        rows = _wide_rows(student_logits_NV)
        for student_NV, ids, *logprobs in zip(
            *(part.split(rows) for part in (student_logits_NV, *teacher)), strict=True
        ):
            logprobs = [part.double() for part in logprobs]
            value += _top_k_kl(student_NV.double(), ids, *logprobs) + _missing(*logprobs)
    if not (torch.is_grad_enabled() and student_logits_NV.requires_grad):
        return value.to(student_logits_NV.dtype)
    return with_value(_top_k_kl(student_logits_NV, *teacher), value)


def _top_k_kl(
    student_NV: torch.Tensor, top_ids_NK: torch.Tensor, top_logprobs_NK: torch.Tensor, tail_N: torch.Tensor
) -> torch.Tensor:
    """`top_k_kl` in the dtype of its arguments."""
    normalizer_N = student_NV.logsumexp(-1)
    student_NK = student_NV.gather(-1, top_ids_NK) - normalizer_N[:, None]
    divergence = _terms(top_logprobs_NK, student_NK).sum()
    if top_ids_NK.shape[-1] == student_NV.shape[-1]:
        return divergence
    # Of the others' own logits: 1 minus the mass of the kept ones would be all rounding where it is small.
    others_N = student_NV.scatter(-1, top_ids_NK, -torch.inf).logsumexp(-1) - normalizer_N
    return divergence + _terms(tail_N, others_N).sum()


def _missing(top_logprobs_NK: torch.Tensor, tail_N: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of 1 minus the mass of all outcomes; 0 where none is known."""
    mass_N = top_logprobs_NK.exp().sum(-1) + tail_N.exp()
    return torch.where(mass_N > 0, 1 - mass_N, 0).sum()


def _terms(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """p (log p - log q), 0 where p is 0 whatever q is."""
    possible = torch.isfinite(teacher)
    difference = torch.where(possible, teacher, 0) - torch.where(possible, student, 0)
    return torch.where(possible, teacher.exp() * difference, 0)


def _divergence(
    of_log_probs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """tau^2 times a divergence of log-probabilities (student, teacher), of logits."""
    with torch.no_grad():
        value = torch.zeros((), dtype=torch.float64, device=student_NV.device)
        rows = _wide_rows(student_NV)
        for student, teacher in zip(student_NV.split(rows), teacher_NV.split(rows), strict=True):
            value += of_log_probs(*_log_probs(student.double(), teacher.double(), temperature))
        value *= temperature**2
    if not (torch.is_grad_enabled() and student_NV.requires_grad):
        return value.to(student_NV.dtype)
    return with_value(temperature**2 * of_log_probs(*_log_probs(student_NV, teacher_NV, temperature)), value)


def _wide_rows(logits_NV: torch.Tensor) -> int:
    """Tokens whose logits are in float64 at once."""
    return max(1, _WIDE_LOGITS.get(logits_NV.device.type, _WIDE_LOGITS["cpu"]) // logits_NV.shape[-1])


def _log_probs(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum of p (log p - log q), both given as logarithms; logits of a whole vocabulary are large, so few copies.

    In float32, of which only the gradient counts, as products of whole tensors, which need no room for
    p (log p - log q) itself.
    """
    p, q = p.flatten(), q.flatten()
    share = p.exp()
    if p.dtype == torch.float64:
        return torch.dot(share, p - q)
    return torch.dot(share, p) - torch.dot(share, q)
