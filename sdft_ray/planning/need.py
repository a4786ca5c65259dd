"""The memory that one process needs at its peak, by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MIB = 2**20
GIB = 2**30

Place = Literal["memory", "GPU memory"]

TORCH_PROCESS = 700 * MIB
"""Resident size of a Ray worker that has torch, transformers, peft and our training loop imported, and has multiplied a
matrix: 660 MiB alone and 40 MiB of Ray, of which half are pages of libraries (torch 2.13, transformers 5.19, Ray 2.60).
"""
VLLM_PROCESS = 960 * MIB
"""The same with vLLM's engine started over a model of 6 MB: 990 MiB, less its weights and keys and values (0.32)."""
TEXT_PROCESS = 330 * MIB
"""A worker that reads and checks rows: pyarrow, tokenizers, sympy, no torch."""
HARNESS_PROCESS = 780 * MIB
"""The actor that holds lm-eval with its data sets and tokenizer, which import torch."""
CUDA_CONTEXT = 600 * MIB
"""GPU memory that a process takes before its first tensor: context, kernels, workspaces of cuBLAS."""


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of one process, by term. `count` processes are alike, and run side by side."""

    terms: Mapping[str, int]
    place: Place = "memory"
    count: int = 1

    @property
    def each(self) -> int:
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        return self.each * self.count

    @property
    def largest(self) -> str:
        """The name of the largest term beside the process itself, which nothing makes smaller."""
        return max(self.terms, key=lambda name: self.terms[name] if name not in ("process", "harness") else -1)


def peak(*phases: Mapping[str, int]) -> dict[str, int]:
    """The terms of the phase that takes most; phases come one after another and free what they held."""
    return dict(max(phases, key=lambda terms: sum(terms.values())))


def num_gib(num_bytes: float) -> str:
    """`1.25 GiB`; below one tenth of it in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.0f} MiB"
