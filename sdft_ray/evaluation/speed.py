"""Measured tokens per second of several checkpoints, side by side in one process.

Machines drift: clocks, neighbours, caches. So the models take turns in every round, each round begins with
another one, the first round does not count, and the median over rounds is reported with its spread.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sdft_ray.errors import EvaluationError
from sdft_ray.models.loading import load_model


@dataclass(frozen=True)
class Rate:
    """Tokens per second over rounds: the median, the quartiles around it, and every round."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class ModelSpeed:
    """`prefill` counts prompt tokens, `decode` new tokens after the first; both over the whole batch."""

    prefill: Rate
    decode: Rate


def measure_speed(
    model_dirs: Mapping[str, str | Path],
    *,
    batch_rows: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    rounds: int = 5,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, ModelSpeed]:
    """Measure checkpoints, by name, with transformers: one forward over random prompts, then greedy decoding.

    All models are held at once. Prompts hold the same random tokens for every model. `new_tokens` is at least
    2: the first comes out of the prefill. `on_round` is called with (rounds done, rounds in all). Raises
    `EvaluationError` for sizes out of range and `ModelError` as `load_model`.
    """
    smallest = {"batch_rows": 1, "prompt_tokens": 1, "new_tokens": 2, "rounds": 1}
    given = {
        "batch_rows": batch_rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    for name, least in smallest.items():
        if given[name] < least:
            raise EvaluationError(f"{name} is {given[name]}", f"make it {least} or more")
    loaded: dict[str, Any] = {name: load_model(Path(path), dtype) for name, path in model_dirs.items()}
    models = {name: model.to(device) for name, model in loaded.items()}
    for name, model in models.items():
        context = model.config.get_text_config().max_position_embeddings
        if prompt_tokens + new_tokens > context:
            raise EvaluationError(
                f"{prompt_tokens} + {new_tokens} tokens do not fit into the context of {name}, {context}",
                "measure with fewer prompt_tokens or new_tokens",
            )
    vocab_size = min((model.config.get_text_config().vocab_size for model in models.values()), default=1)
    generator = torch.Generator().manual_seed(seed)
    prompts_BT = torch.randint(vocab_size, (batch_rows, prompt_tokens), generator=generator).to(device)
    prefill_s: dict[str, list[float]] = {name: [] for name in models}
    decode_s: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for round_index in range(rounds + 1):
        turn = round_index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            times = _time_once(models[name], prompts_BT, new_tokens)
            if round_index > 0:
                prefill_s[name].append(times[0])
                decode_s[name].append(times[1])
        if on_round is not None and round_index > 0:
            on_round(round_index, rounds)
    return {
        name: ModelSpeed(
            _rate(batch_rows * prompt_tokens, prefill_s[name]),
            _rate(batch_rows * (new_tokens - 1), decode_s[name]),
        )
        for name in names
    }


@torch.inference_mode()
def _time_once(model: Any, prompts_BT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prefill and for `new_tokens - 1` decoding steps of one batch."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        cache = DynamicCache(config=model.config)
        start = _now(prompts_BT.device)
        token_B1 = _step(model, prompts_BT, cache)
        middle = _now(prompts_BT.device)
        for _ in range(new_tokens - 1):
            token_B1 = _step(model, token_B1, cache)
        end = _now(prompts_BT.device)
    finally:
        if collecting:
            gc.enable()
    return middle - start, end - middle


def _step(model: Any, ids_BT: Tensor, cache: DynamicCache) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits_BTV[:, -1:].argmax(dim=-1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rate(num_tokens: int, seconds: Sequence[float]) -> Rate:
    rounds = tuple(num_tokens / s for s in seconds)
    if len(rounds) == 1:
        return Rate(rounds[0], rounds[0], rounds[0], rounds)
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Rate(median, low, high, rounds)
