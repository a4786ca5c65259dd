"""Which of an arm's trials becomes its student. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.errors import DivergenceError


@dataclass(frozen=True)
class Outcome:
    """How one trial ended: its held-out loss in nats per token, or None and the reason why it has none."""

    learning_rate: float
    seed: int
    held_out_loss: float | None
    reason: str = ""


def best_trial(outcomes: Sequence[Outcome]) -> int:
    """Index of the chosen trial: the rate with the lowest mean over its seeds, then that rate's best seed.

    A rate that lost a seed is worse than any that lost fewer, because the mean over what is left would flatter it.
    Ties go to the lower rate, then the lower seed. Raises `DivergenceError` when every trial is lost.
    """
    if all(outcome.held_out_loss is None for outcome in outcomes):
        raise DivergenceError(
            f"all {len(outcomes)} trials diverged; the first: {outcomes[0].reason}", "give lower learning rates"
        )

    def merit(rate: float) -> tuple[int, float, float]:
        losses = [outcome.held_out_loss for outcome in outcomes if outcome.learning_rate == rate]
        known = [loss for loss in losses if loss is not None]
        return len(losses) - len(known), math.fsum(known) / len(known) if known else math.inf, rate

    rate = min({outcome.learning_rate for outcome in outcomes}, key=merit)
    left = [
        (outcome.held_out_loss, outcome.seed, index)
        for index, outcome in enumerate(outcomes)
        if outcome.learning_rate == rate and outcome.held_out_loss is not None
    ]
    return min(left)[2]
