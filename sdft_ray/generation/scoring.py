"""Log-probabilities of given tokens: batched forward passes of a transformers model, without a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens to score. The model reads `ids`, of which the last `num_scored` are scored; then each of `finals` is
    scored as the next token, independently of the others. Continuations that differ only in their last token share one
    pass.

    At least one token precedes the first scored one.
    """

    ids: tuple[int, ...]
    num_scored: int
    finals: tuple[int, ...]


@dataclass(frozen=True)
class ScoreResult:
    """For each of `finals`: log-probability (nats) of scored tokens plus it, and whether all were the most likely."""

    finals: tuple[tuple[float, bool], ...]


@torch.inference_mode()
def score(
    model: Any, requests: Sequence[ScoreRequest], *, batch_tokens: int = 8192
) -> Iterator[tuple[int, ScoreResult]]:
    """Yield index and result, batch by batch, longest first. A batch has at most `batch_tokens` positions, or one row.

    Log-probabilities are float32, whatever the model's dtype.
    """
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // len(requests[order[start]].ids))
        batch = order[start : start + rows]
        yield from zip(batch, _score(model, [requests[index] for index in batch]), strict=True)
        start += rows


def _score(model: Any, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
    """One forward pass. Logits start at the token before the earliest scored one: K of T positions."""
    width = max(len(row.ids) for row in requests)
    first = min(len(row.ids) - row.num_scored for row in requests) - 1
    ids_BT = torch.zeros(len(requests), width, dtype=torch.int64)
    for index, row in enumerate(requests):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
    # Right padding needs no attention mask: attention is causal and padding is not scored.
    logits_BKV = model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=width - first).logits
    return [
        _of_row(logits_BKV[index, len(row.ids) - 1 - row.num_scored - first : len(row.ids) - first], row)
        for index, row in enumerate(requests)
    ]


def _of_row(logits_NV: Tensor, row: ScoreRequest) -> ScoreResult:
    """From the logits that predict each scored token and the final one."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    likeliest_N = logits_NV.argmax(dim=-1).tolist()
    scored_ids = row.ids[len(row.ids) - row.num_scored :]
    scored_N = torch.tensor(scored_ids, dtype=torch.int64, device=logits_NV.device)
    before = float(logprobs_NV[:-1].gather(1, scored_N[:, None]).sum()) if scored_ids else 0.0
    greedy = list(scored_ids) == likeliest_N[:-1]
    last = logprobs_NV[-1, list(row.finals)].tolist()
    return ScoreResult(
        tuple(
            (before + logprob, greedy and token == likeliest_N[-1])
            for token, logprob in zip(row.finals, last, strict=True)
        )
    )
