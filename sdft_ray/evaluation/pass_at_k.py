"""pass@k: a model whose first answer is wrong may still give the right one in several attempts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task


@dataclass(frozen=True)
class Samples:
    """How answers to the items of generation tasks are sampled: `num` per item."""

    num: int = 8
    temperature: float = 0.8
    top_p: float = 0.95


def pass_at_k(
    lm: Any, leaves: Sequence[Task], metric: str, filtered_by: str, samples: Samples, seed: int
) -> dict[str, float]:
    """k (1, 2, 4, ... and all samples) -> mean chance that one of k answers is right, by the task's own filter and
    metric, whose value per answer is 0 or 1.

    `lm` is an `BatchedLM`. Call it after scoring: it overwrites the answers stored in the tasks' requests.
    """
    counts: list[int] = []
    for task in leaves:
        requests = task.instances
        texts = lm.sample(requests, samples, seed)
        right = [0] * len(requests)
        for number in range(samples.num):
            for request, written in zip(requests, texts, strict=True):
                request.resps, request.filtered_resps = [written[number]], {}
            task.apply_filters()
            for index, request in enumerate(requests):
                values: Any = task.process_results(request.doc, [request.filtered_resps[filtered_by]])
                right[index] += values[metric] > 0
        counts += right
    ks = sorted({samples.num, *(2**power for power in range(samples.num.bit_length()) if 2**power <= samples.num)})
    return {str(k): statistics.fmean(chance(samples.num, count, k) for count in counts) for k in ks}


def chance(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): that at least one of k of the n samples is right (arXiv:2107.03374, equation 1)."""
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
