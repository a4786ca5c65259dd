"""The terms of an objective on one micro-batch: losses of logits by chunks, and distances between hidden states.

Suffixes: N response tokens of a micro-batch, C those of a chunk, D hidden channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from sdft_ray.recipe.arms import Objective
from sdft_ray.training.divergences import forward_kl, jensen_shannon, reverse_kl, top_k_kl
from sdft_ray.training.head import ChunkLoss
from sdft_ray.training.sums import with_value

Sums = dict[str, torch.Tensor]
"""Term -> its sum over tokens, before its weight, a float64 scalar."""

_WIDE_ROWS = 512  # hidden states in float64 at once


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The teacher's likeliest K tokens at each of N, as `divergences.top_k_kl` takes them; all -inf where unknown."""

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    tail_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """A teacher's outputs at the N positions that predict a response token. No gradient.

    Hidden states (N, D) with the teacher's own head, and the outputs of some of its blocks; or its likeliest tokens.
    `known_N` marks the positions for which they are known (None: all); divergences are 0 at the others.
    """

    hidden_ND: torch.Tensor | None = None
    head: torch.nn.Module | None = None
    softcap: float | None = None
    blocks: Sequence[torch.Tensor] = ()
    top: TopTokens | None = None
    known_N: torch.Tensor | None = None

    def beside(self, logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of student and teacher at the known positions, over the tokens that both vocabularies have."""
        assert self.hidden_ND is not None, "whole distributions are computed from hidden states"
        assert self.head is not None, "and by a head"
        hidden_CD = self.hidden_ND[chunk]
        if self.known_N is not None:
            known_C = self.known_N[chunk]
            logits_CV, hidden_CD = logits_CV[known_C], hidden_CD[known_C]
        with torch.no_grad():
            teacher_CV = capped(self.head(hidden_CD).float(), self.softcap)
        shared = min(logits_CV.shape[1], teacher_CV.shape[1])
        return logits_CV[:, :shared], teacher_CV[:, :shared]

    def top_k_kl(self, logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The KL divergence of the student from the top tokens."""
        assert self.top is not None, "the objective needs the top tokens"
        return top_k_kl(logits_CV, self.top.ids_NK[chunk], self.top.logprobs_NK[chunk], self.top.tail_N[chunk])


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits limited to (-softcap, softcap) by tanh: Gemma 2, arXiv:2408.00118, section 2."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def softcap_of(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def chunk_loss(
    objective: Objective, targets_N: torch.Tensor, teacher: TeacherOutputs | None, sums: Sums, softcap: float | None
) -> ChunkLoss:
    """The loss function for `head.head_loss`: cross-entropy and divergences. It also adds each term to `sums`.

    Where teacher and student have different numbers of logits, one vocabulary is padded; they are compared on the
    tokens that both have.
    """
    tau, beta = objective.temperature, objective.beta
    divergences: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "forward_kl": lambda student, other: forward_kl(student, other, tau),
        "reverse_kl": lambda student, other: reverse_kl(student, other, tau),
        "jensen_shannon": lambda student, other: jensen_shannon(student, other, tau, beta),
    }

    def loss_of(logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits_CV = capped(logits_CV, softcap)
        values: Sums = {}
        if objective.cross_entropy:
            values["cross_entropy"] = F.cross_entropy(logits_CV, targets_N[chunk], reduction="sum")
        if objective.divergences:
            assert teacher is not None, "a divergence needs a teacher"
            whole = [name for name in objective.divergences if name in divergences]
            sides = teacher.beside(logits_CV, chunk) if whole else ()
            values |= {name: divergences[name](*sides) for name in whole}
            if objective.top_k_kl:
                values["top_k_kl"] = teacher.top_k_kl(logits_CV, chunk)
        add_to(sums, values)
        return weighted_sum(values, objective.weights, logits_CV.device)

    return loss_of


def match_loss(
    objective: Objective, student_blocks: Sequence[torch.Tensor], teacher_blocks: Sequence[torch.Tensor], sums: Sums
) -> torch.Tensor:
    """The distance between hidden states (N, D) of mapped blocks: mean over blocks, sum over tokens."""
    values: Sums = {}
    for student_ND, teacher_ND in zip(student_blocks, teacher_blocks, strict=True):
        student_ND, teacher_ND = student_ND.float(), teacher_ND.float()
        for name in objective.matches:
            if name == "hidden_cosine":
                distance = _cosine_distance(student_ND, teacher_ND)
            else:
                distance = (student_ND - teacher_ND).square().mean(-1).sum()
            values[name] = values.get(name, 0) + distance / len(student_blocks)
    add_to(sums, values)
    return weighted_sum(values, objective.weights, student_blocks[0].device)


def _cosine_distance(student_ND: torch.Tensor, teacher_ND: torch.Tensor) -> torch.Tensor:
    """The sum of 1 - cosine, whose value float32 would round to nothing where the two are close."""

    def distance(student_ND: torch.Tensor, teacher_ND: torch.Tensor) -> torch.Tensor:
        return (1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)).sum()

    with torch.no_grad():
        rows = zip(student_ND.split(_WIDE_ROWS), teacher_ND.split(_WIDE_ROWS), strict=True)
        value = sum((distance(student.double(), teacher.double()) for student, teacher in rows), torch.zeros(()))
    return with_value(distance(student_ND, teacher_ND), value)


def add_to(sums: Sums, values: Sums) -> None:
    """Add each term's value to its sum, in place and without its gradient."""
    for name, value in values.items():
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value


def weighted_sum(values: Sums, weights: Mapping[str, float], device: torch.device) -> torch.Tensor:
    """The sum over terms of weight times value, a float32 scalar; 0 without terms."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for name, value in values.items():
        total = total + weights[name] * value
    return total


@contextmanager
def block_outputs(model: Any, blocks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Within the context a forward pass appends the outputs (B, T, D) of these blocks to the list, in their order."""
    outputs: list[torch.Tensor] = []

    def append(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    assert list(blocks) == sorted(blocks), "blocks are in ascending order"
    layers = model.get_decoder().layers
    hooks = [layers[block].register_forward_hook(append) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def mapped_blocks(keep_blocks: Sequence[int], num_teacher_blocks: int) -> list[int]:
    """For each student block, the teacher block whose output it should reproduce.

    That is the block before the next one that is kept, so that each block reads the input that it read in the teacher;
    for the last one, the teacher's last block.

    >>> mapped_blocks([0, 1, 4], 6)
    [0, 3, 5]
    """
    return [block - 1 for block in (*keep_blocks[1:], num_teacher_blocks)]
