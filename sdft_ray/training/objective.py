"""An objective at work on one micro-batch: which loss each chunk of logits gets, and how far hidden states are apart.

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

Sums = dict[str, torch.Tensor]
"""Term -> its sum over tokens, before its weight."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The teacher's likeliest K tokens at each of N, as `divergences.top_k_kl` takes them; all -inf where unknown."""

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    tail_N: torch.Tensor


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """What a teacher made of the N tokens before each response token: hidden states (N, D), for its own head, and
    the outputs of some of its blocks, or its likeliest tokens. No gradient.

    `known_N` marks the tokens of which hidden states and top tokens speak: None for all. Divergences are 0 on others.
    """

    hidden_ND: torch.Tensor | None = None
    head: torch.nn.Module | None = None
    softcap: float | None = None
    blocks: Sequence[torch.Tensor] = ()
    top: TopTokens | None = None
    known_N: torch.Tensor | None = None

    def beside(self, logits_CV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's logits where the teacher's are known, and the teacher's there, on the tokens both have."""
        assert self.hidden_ND is not None, "whole distributions come from hidden states"
        assert self.head is not None, "and from a head"
        hidden_CD = self.hidden_ND[chunk]
        if self.known_N is not None:
            known_C = self.known_N[chunk]
            logits_CV, hidden_CD = logits_CV[known_C], hidden_CD[known_C]
        with torch.no_grad():
            teacher_CV = capped(self.head(hidden_CD).float(), self.softcap)
        shared = min(logits_CV.shape[1], teacher_CV.shape[1])
        return logits_CV[:, :shared], teacher_CV[:, :shared]

    def top_k_kl(self, logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Of the student from the top tokens."""
        assert self.top is not None, "the top k were kept"
        return top_k_kl(logits_CV, self.top.ids_NK[chunk], self.top.logprobs_NK[chunk], self.top.tail_N[chunk])


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits bent into (-softcap, softcap): Gemma 2, arXiv:2408.00118, section 2."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def softcap_of(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def chunk_loss(
    objective: Objective, targets_N: torch.Tensor, teacher: TeacherOutputs | None, sums: Sums, softcap: float | None
) -> ChunkLoss:
    """What `head.head_loss` takes, for cross-entropy and divergences. Each term is added to `sums` on the way.

    Where teacher and student have different numbers of logits, the larger vocabulary is padded, and they are
    compared on the tokens that both have.
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
            assert teacher is not None, "a divergence has a teacher"
            whole = [name for name in objective.divergences if name in divergences]
            sides = teacher.beside(logits_CV, chunk) if whole else ()
            values |= {name: divergences[name](*sides) for name in whole}
            if objective.top_k_kl:
                values["top_k_kl"] = teacher.top_k_kl(logits_CV, chunk)
        return weighted(objective, values, sums, logits_CV)

    return loss_of


def match_loss(
    objective: Objective, student_blocks: Sequence[torch.Tensor], teacher_blocks: Sequence[torch.Tensor], sums: Sums
) -> torch.Tensor:
    """Hidden states (N, D) of mapped blocks compared: mean over blocks, sum over tokens."""
    values: Sums = {}
    for student_ND, teacher_ND in zip(student_blocks, teacher_blocks, strict=True):
        student_ND, teacher_ND = student_ND.float(), teacher_ND.float()
        for name in objective.matches:
            if name == "hidden_cosine":
                apart = (1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)).sum()
            else:
                apart = (student_ND - teacher_ND).square().mean(-1).sum()
            values[name] = values.get(name, 0) + apart / len(student_blocks)
    return weighted(objective, values, sums, student_blocks[0])


def weighted(objective: Objective, values: Sums, sums: Sums, like: torch.Tensor) -> torch.Tensor:
    """The values' sum by the objective's weights; each is added to `sums`."""
    total = like.new_zeros((), dtype=torch.float32)
    for name, value in values.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        total = total + getattr(objective, name) * value
    return total


@contextmanager
def block_outputs(model: Any, blocks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Inside, a forward pass leaves the outputs (B, T, D) of these blocks, in their order, in the list."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    assert list(blocks) == sorted(blocks), "blocks run in their order"
    layers = model.get_decoder().layers
    hooks = [layers[block].register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def mapped_blocks(keep_blocks: Sequence[int], num_teacher_blocks: int) -> list[int]:
    """For each student block, the teacher block whose output it should reproduce.

    That is the block before the next one kept, so that each kept block reads what it read in the teacher; for the
    last one, the teacher's last.

    >>> mapped_blocks([0, 1, 4], 6)
    [0, 3, 5]
    """
    return [block - 1 for block in (*keep_blocks[1:], num_teacher_blocks)]
