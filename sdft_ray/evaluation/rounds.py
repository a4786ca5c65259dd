"""A figure measured in several rounds, and ratios of two figures by round. Imports neither torch nor numpy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """One figure over rounds: the median, the quartiles `low` and `high` around it, and every round in order."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class BatchSpeed:
    """One model with `batch_rows` prompts at once.

    `prefill` counts prompt tokens, `decode` new tokens after the first, both per second and over the whole batch.
    `first_token_s`: seconds until the first new token of every prompt is known. It is the interval that `prefill`
    counts tokens over, for nothing queues and nothing is streamed here.

    `kv_bytes`: keys and values in the cache at the end, those of all tokens but the last new one. Blocks with a sliding
    window hold the window less one token. `peak_bytes`: the most that was held during a run beyond what was there
    before it and those keys and values, so activations, logits, and copies of keys and values while they grow. It is
    None on a CPU: there PyTorch does not count, and the process keeps pages that one model has freed and fills them for
    the next, so that its resident memory does not tell models apart.
    """

    batch_rows: int
    prefill: Summary
    decode: Summary
    first_token_s: Summary
    kv_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class ModelSpeed:
    """`weight_bytes`: all parameters as held, tied ones once. `batches`: in the order they were asked for."""

    weight_bytes: int
    batches: tuple[BatchSpeed, ...]


def over_rounds(values: Iterable[float]) -> Summary:
    """The spread of at least one value; quartiles are interpolated between the values themselves."""
    rounds = tuple(values)
    assert rounds, "a figure needs a round"
    if len(rounds) == 1:
        return Summary(rounds[0], rounds[0], rounds[0], rounds)
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Summary(median, low, high, rounds)


def ratio(above: Summary, below: Summary) -> Summary:
    """`above` over `below` within each round, so that a slower machine during a whole round cancels."""
    return over_rounds(one / other for one, other in zip(above.rounds, below.rounds, strict=True))
