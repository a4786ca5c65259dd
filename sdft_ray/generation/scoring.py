"""How likely a model holds given tokens: batched forward passes of a transformers model, without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """Tokens to score. Of `ids`, which the model reads, the last `num_scored` are scored; then each of `finals` as the
    token after them, the others aside. Continuations that differ in their last token alone share one pass.

    Before the first scored token stands at least one other.
    """

    ids: tuple[int, ...]
    num_scored: int
    finals: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """For each of `finals`: log-probability in nats of the scored tokens and it, and whether each was the likeliest."""

    finals: tuple[tuple[float, bool], ...]


@torch.inference_mode()
def score(model: Any, asked: Sequence[Scoring], *, batch_tokens: int = 8192) -> Iterator[tuple[int, Scored]]:
    """Index and answer, batch by batch, the longest first. A batch holds at most `batch_tokens` positions, or one row.

    Log-probabilities are float32, whatever the model's dtype.
    """
    order = sorted(range(len(asked)), key=lambda index: -len(asked[index].ids))
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // len(asked[order[start]].ids))
        batch = order[start : start + rows]
        yield from zip(batch, _score(model, [asked[index] for index in batch]), strict=True)
        start += rows


def _score(model: Any, asked: Sequence[Scoring]) -> list[Scored]:
    """One forward pass. Logits are taken from the token before the earliest scored one on: K of T positions."""
    width = max(len(row.ids) for row in asked)
    first = min(len(row.ids) - row.num_scored for row in asked) - 1
    ids_BT = torch.zeros(len(asked), width, dtype=torch.int64)
    for index, row in enumerate(asked):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
    # Right padding needs no attention mask: attention is causal and the pads are not scored.
    logits_BKV = model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=width - first).logits
    return [
        _of_row(logits_BKV[index, len(row.ids) - 1 - row.num_scored - first : len(row.ids) - first], row)
        for index, row in enumerate(asked)
    ]


def _of_row(logits_NV: Tensor, row: Scoring) -> Scored:
    """From the logits that stand before each scored token and before the final one."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    likeliest_N = logits_NV.argmax(dim=-1).tolist()
    told = row.ids[len(row.ids) - row.num_scored :]
    wanted = torch.tensor(told, dtype=torch.int64, device=logits_NV.device)
    before = float(logprobs_NV[:-1].gather(1, wanted[:, None]).sum()) if told else 0.0
    greedy = list(told) == likeliest_N[:-1]
    last = logprobs_NV[-1, list(row.finals)].tolist()
    return Scored(
        tuple(
            (before + logprob, greedy and token == likeliest_N[-1])
            for token, logprob in zip(row.finals, last, strict=True)
        )
    )
