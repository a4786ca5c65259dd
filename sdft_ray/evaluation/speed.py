"""Measured speed and memory of several checkpoints, side by side in one process, at one or more batch sizes.

Machines drift: clocks, neighbours, caches. So the models take turns at every batch size of every round, each round
begins with another model, the first round does not count, and the median over rounds is reported with its spread.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.rounds import BatchSpeed, ModelSpeed, over_rounds
from sdft_ray.models.loading import load_model


@dataclass(frozen=True)
class _Run:
    """One batch, from prompts to the last new token; `BatchSpeed` says what the bytes are."""

    prefill_s: float
    decode_s: float
    kv_bytes: int
    peak_bytes: int | None


def measure_speed(
    model_dirs: Mapping[str, str | Path],
    *,
    batch_rows: Sequence[int] = (1, 16),
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 5,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, ModelSpeed]:
    """Measure checkpoints, by name, with transformers: one forward over random prompts, then greedy decoding.

    All models are held at once. Every model reads the same random tokens, a smaller batch the first prompts of the
    largest. `new_tokens` is at least 2: the first comes out of the prefill. `on_round` is called with (rounds done,
    rounds in all). Raises `EvaluationError` for sizes out of range and `ModelError` as `load_model`.
    """
    _check_sizes(batch_rows, prompt_tokens=(prompt_tokens, 1), new_tokens=(new_tokens, 2), rounds=(rounds, 1))
    loaded: dict[str, Any] = {name: load_model(Path(path), dtype) for name, path in model_dirs.items()}
    models = {name: model.to(device) for name, model in loaded.items()}
    _check_contexts(models, prompt_tokens, new_tokens)
    prompts_BT = _random_prompts(models, max(batch_rows), prompt_tokens, seed).to(device)
    runs = _take_turns(models, [prompts_BT[:rows] for rows in batch_rows], new_tokens, rounds, on_round)
    return {
        name: ModelSpeed(
            sum(parameter.nbytes for parameter in model.parameters()),
            tuple(_batch_speed(rows, prompt_tokens, new_tokens, runs[name, rows]) for rows in batch_rows),
        )
        for name, model in models.items()
    }


def _check_sizes(batch_rows: Sequence[int], **given: tuple[int, int]) -> None:
    """`given`: what was asked for, and the least that can be measured."""
    if len(set(batch_rows)) < max(1, len(batch_rows)):
        raise EvaluationError(f"batch_rows is {list(batch_rows)}", "give one or more different sizes")
    for name, (value, least) in (*(("batch_rows", (rows, 1)) for rows in batch_rows), *given.items()):
        if value < least:
            raise EvaluationError(f"{name} is {value}", f"make it {least} or more")


def _check_contexts(models: Mapping[str, Any], prompt_tokens: int, new_tokens: int) -> None:
    for name, model in models.items():
        context = model.config.get_text_config().max_position_embeddings
        if prompt_tokens + new_tokens > context:
            raise EvaluationError(
                f"{prompt_tokens} + {new_tokens} tokens do not fit into the context of {name}, {context}",
                "measure with fewer prompt_tokens or new_tokens",
            )


def _random_prompts(models: Mapping[str, Any], num_rows: int, num_tokens: int, seed: int) -> Tensor:
    """Ids that every model knows, [num_rows, num_tokens]."""
    vocab_size = min((model.config.get_text_config().vocab_size for model in models.values()), default=1)
    return torch.randint(vocab_size, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))


def _take_turns(
    models: Mapping[str, Any],
    batches: Sequence[Tensor],
    new_tokens: int,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> dict[tuple[str, int], list[_Run]]:
    """(model, batch size) -> one run per round that counts."""
    names = list(models)
    runs: dict[tuple[str, int], list[_Run]] = {(name, len(batch)): [] for name in names for batch in batches}
    for round_index in range(rounds + 1):
        turn = round_index % max(1, len(names))
        for prompts_BT in batches:
            for name in names[turn:] + names[:turn]:
                run = _run_once(models[name], prompts_BT, new_tokens)
                if round_index > 0:
                    runs[name, len(prompts_BT)].append(run)
        if on_round is not None and round_index > 0:
            on_round(round_index, rounds)
    return runs


@torch.inference_mode()
def _run_once(model: Any, prompts_BT: Tensor, new_tokens: int) -> _Run:
    """The prefill and `new_tokens - 1` decoding steps of one batch."""
    collecting, device = gc.isenabled(), prompts_BT.device
    gc.disable()
    try:
        cache = DynamicCache(config=model.config)
        held_before = _start_counting(device)
        start = _now(device)
        token_B1 = _step(model, prompts_BT, cache)
        middle = _now(device)
        for _ in range(new_tokens - 1):
            token_B1 = _step(model, token_B1, cache)
        end = _now(device)
    finally:
        if collecting:
            gc.enable()
    kv_bytes = _cached_bytes(cache)
    peak_bytes = None if held_before is None else torch.cuda.max_memory_allocated(device) - held_before - kv_bytes
    return _Run(middle - start, end - middle, kv_bytes, peak_bytes)


def _step(model: Any, ids_BT: Tensor, cache: DynamicCache) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits_BTV[:, -1:].argmax(dim=-1)


def _cached_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _start_counting(device: torch.device) -> int | None:
    """Bytes held on a GPU now, from where its peak is counted anew; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _batch_speed(batch_rows: int, prompt_tokens: int, new_tokens: int, runs: Sequence[_Run]) -> BatchSpeed:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return BatchSpeed(
        batch_rows=batch_rows,
        prefill=over_rounds(batch_rows * prompt_tokens / run.prefill_s for run in runs),
        decode=over_rounds(batch_rows * (new_tokens - 1) / run.decode_s for run in runs),
        first_token_s=over_rounds(run.prefill_s for run in runs),
        kv_bytes=runs[-1].kv_bytes,
        peak_bytes=max(peaks, default=None),
    )
