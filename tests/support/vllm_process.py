"""One process that has imported vLLM, which takes most of an engine's start; its engines run in it, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_ray.generation.sampler import Sampled, SamplingParams
    from sdft_ray.generation.scoring import ScoreRequest, ScoreResult

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

Call = tuple[Sequence[Sequence[int]], Sequence[int], "SamplingParams"]
"""Prompts, their seeds, and how to sample."""


@contextmanager
def vllm_process() -> Iterator[Callable[..., Any]]:
    """Give `call(function, *args)`, which runs a function of a module in the process and returns or raises as it does.

    The process starts with the first call.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare) as executor:
        yield lambda function, *args: executor.submit(function, *args).result()


def _prepare() -> None:
    os.environ.update(_ENVIRONMENT)  # vLLM and torch read it when they are imported


def sampled(model_dir: Path, dtype: str, calls: Sequence[Call]) -> list[list[Sampled]]:
    """Responses of one `VllmSampler` with a context of 64 tokens to all calls."""
    from sdft_ray.generation.vllm_sampler import VllmSampler

    sampler = VllmSampler(model_dir, dtype=dtype, kv_cache_bytes=32 << 20, max_model_tokens=64, max_sequences=8)
    with closing(sampler):
        return [sampler.sample(prompts, params, seeds) for prompts, seeds, params in calls]


def scored(
    model_dir: Path, dtype: str, requests: Sequence[ScoreRequest], kv_cache_bytes: int = 32 << 20
) -> list[ScoreResult]:
    """Likelihoods that one `VllmSampler` gives when it is asked for all of them at once."""
    from sdft_ray.generation.vllm_sampler import VllmSampler

    with closing(VllmSampler(model_dir, dtype=dtype, kv_cache_bytes=kv_cache_bytes)) as sampler:
        futures = [sampler.submit_score(request) for request in requests]
        return [future.result() for future in futures]


def decoded(model_dirs: Sequence[Path], prompt: Sequence[int], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of a stock engine for each checkpoint, in float32."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    responses = []
    for model_dir in model_dirs:
        engine: Any = LLM(
            str(model_dir), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**24, max_model_len=64
        )
        (output,) = engine.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        responses.append(list(output.outputs[0].token_ids))
        del engine
    return responses
