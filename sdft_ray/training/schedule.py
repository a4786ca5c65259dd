"""Learning rate as a function of the step, and the names of the choices that a plan makes."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]
OptimizerKind = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16"]


def learning_rate(
    step: int,
    num_steps: int,
    peak: float,
    kind: ScheduleKind,
    warmup_fraction: float = 0.0,
    decay_fraction: float = 0.5,
) -> float:
    """The rate of `step` (0-based) out of `num_steps`; never zero, so that no step is wasted.

    Linear warm-up over the first `warmup_fraction` of the steps, reaching `peak` at its last step. Then
    `cosine` and `linear` fall towards zero over all remaining steps, `wsd` (warm-up, stable, decay;
    arXiv:2405.18392) stays at `peak` and falls linearly over the last `decay_fraction` of all steps,
    `constant` stays. Fractions are in [0, 1].

    >>> [round(learning_rate(step, 4, 1.0, "wsd", 0.25, 0.5), 3) for step in range(4)]
    [1.0, 1.0, 1.0, 0.5]
    """
    assert 0 <= step < num_steps, "step is 0-based and below num_steps"
    num_warmup = round(warmup_fraction * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if kind == "constant":
        return peak
    num_decay = num_steps - num_warmup
    if kind == "wsd":
        num_decay = min(num_decay, round(decay_fraction * num_steps))
    num_left = num_steps - step  # 1 at the last step
    if num_left >= num_decay:
        return peak
    fraction_left = num_left / num_decay
    if kind == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * fraction_left))
    return peak * fraction_left
