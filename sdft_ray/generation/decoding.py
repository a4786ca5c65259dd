"""Decoding with a transformers model: left-padded batches, a KV cache, one random generator per row.

A row's tokens depend on its prompt, the parameters and its seed, not on the other rows of the batch (up to rounding in
the forward pass): noise is drawn per row, and the sampled token is the argmax of log-probability plus Gumbel noise,
which is an exact sample from the softmax (Gumbel 1954; Maddison et al., arXiv:1411.0030).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_ray.data.signals import Signals
from sdft_ray.generation.recording import SignalRecorder
from sdft_ray.generation.sampler import SamplingParams

Decoded = tuple[list[int], Literal["stop", "length"], Signals | None]
"""New token ids with the end token, the finish reason, and the requested signals per token."""


class Truncation(Protocol):
    """The sampling parameters that `truncated_logits` reads."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


def truncated_logits(logits_BV: Tensor, params: Truncation) -> Tensor:
    """Logits divided by the temperature (above 0), set to -inf outside top-k and then outside top-p; (B, V)."""
    logits_BV = logits_BV / params.temperature
    if 0 < params.top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if params.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        # A token stays if the more likely ones before it sum to less than top_p: the first always stays.
        outside_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= params.top_p
        outside_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), -torch.inf)
    return logits_BV


def choose_tokens(logits_BV: Tensor, params: Truncation, noise: Sequence[torch.Generator]) -> Tensor:
    """One token id per row, shape (B,). Each generator advances by V draws; it is always on the CPU."""
    if params.temperature == 0:
        return logits_BV.argmax(dim=-1)
    size = logits_BV.shape[-1]
    exponential_BV = torch.stack(
        [torch.empty(size, dtype=torch.float64).exponential_(generator=generator) for generator in noise]
    )
    gumbel_BV = -exponential_BV.clamp_min(1e-300).log().to(logits_BV)
    return (truncated_logits(logits_BV, params) + gumbel_BV).argmax(dim=-1)


def end_token_ids(model: Any, stop_ids: Collection[int]) -> set[int]:
    """Token ids that end a response: `stop_ids` of the chat format, and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    own = [ends] if isinstance(ends, int) else list(ends or [])
    return {*own, *stop_ids}


def left_padded(prompts_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T) int64; every prompt ends in the last column."""
    longest = max(len(ids) for ids in prompts_ids)
    ids_BT = torch.zeros(len(prompts_ids), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(prompts_ids):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
        mask_BT[row, longest - len(ids) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


@torch.inference_mode()
def decode(
    model: Any,
    prompts_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    *,
    stop_token_ids: Collection[int],
    max_model_tokens: int,
    is_stopped: Callable[[list[int]], bool] | None = None,
) -> list[Decoded]:
    """Generate responses to non-empty prompts as one batch with a causal LM of transformers, in order.

    `max_model_tokens` limits prompt plus response of each row. `is_stopped` is called with a row's new tokens after
    each token, newest last.
    """

    def ends(ids: list[int]) -> bool:
        return ids[-1] in stop_token_ids or (is_stopped is not None and is_stopped(ids))

    with SignalRecorder(model, params) as recorder:
        written = _decode(model, prompts_ids, params, seeds, ends, max_model_tokens, recorder)
    return [(ids, "stop" if ends(ids) else "length", recorder.signals(i, len(ids))) for i, ids in enumerate(written)]


def _decode(
    model: Any,
    prompts_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    ends: Callable[[list[int]], bool],
    max_model_tokens: int,
    recorder: SignalRecorder,
) -> list[list[int]]:
    rooms = [min(params.max_tokens, max_model_tokens - len(ids)) for ids in prompts_ids]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    written: list[list[int]] = [[] for _ in prompts_ids]
    running = set(range(len(prompts_ids)))
    steps = batch_steps(model, prompts_ids)
    logits_BV, in_batch = next(steps)
    while True:
        recorder.add(logits_BV, in_batch)
        tokens_B = choose_tokens(logits_BV, params, [noise[i] for i in in_batch])
        for i, token in zip(in_batch, tokens_B.tolist(), strict=True):
            if i in running:
                written[i].append(token)
                if ends(written[i]) or len(written[i]) == rooms[i]:
                    running.discard(i)
        if not running:
            return written
        logits_BV, in_batch = steps.send((tokens_B, running))


def batch_steps(
    model: Any, prompts_ids: Sequence[Sequence[int]]
) -> Generator[tuple[Tensor, list[int]], tuple[Tensor, Collection[int]], None]:
    """Forward passes over non-empty prompts as one batch, with a KV cache.

    Yields the logits of the next token, (B, V) float32, and the index of the prompt behind each row. Send one token
    per row, (B,) int64, and the indices of the prompts that continue; some finished ones may still be in the next
    batch. Run it without gradients.
    """
    in_batch = list(range(len(prompts_ids)))  # the prompt behind every row of the tensors
    ids_BT, mask_BT = left_padded(prompts_ids, model.device)
    positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    while True:
        logits_BV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens_B, running = yield logits_BV.float(), in_batch
        positions_BT = positions_BT[:, -1:] + 1
        if len(running) <= len(in_batch) // 2:
            # Finished rows cost as much as running ones; dropping them only at half the batch limits the copying.
            remaining = [row for row, i in enumerate(in_batch) if i in running]
            rows = torch.tensor(remaining, dtype=torch.int64, device=mask_BT.device)
            cache.batch_select_indices(rows)
            tokens_B, mask_BT, positions_BT = tokens_B[rows], mask_BT[rows], positions_BT[rows]
            in_batch = [in_batch[row] for row in remaining]
        ids_BT = tokens_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(in_batch), 1)], dim=-1)
