"""A running mean of the weights, often a better model than the last weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Average:
    """Exponential moving average of float32 masters, by name; none is kept when `decay` is None.

    After step t (0-based) a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), so that the early
    weights are forgotten in short runs too.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], decay: float | None) -> None:
        self._masters = masters
        self._decay = decay
        self.values = {} if decay is None else {name: torch.empty_like(p.data) for name, p in masters.items()}

    def start(self) -> None:
        """Start from the current weights."""
        for name, average in self.values.items():
            average.copy_(self._masters[name].data)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after `step`."""
        if self._decay is None:
            return
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.data for p in self._masters.values()], share)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Continue from the averages of an interrupted run, which must have the same names."""
        assert values.keys() == self.values.keys(), "the state belongs to another plan"
        for name, average in self.values.items():
            average.copy_(values[name])

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Replace the weights by their averages."""
        for name, average in self.values.items():
            self._masters[name].copy_(average)
