"""Likelihoods out of vLLM: it tells those of a prompt's own tokens, and those of chosen tokens after it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from sdft_ray.generation.scoring import Scored


def scoring_params(**asked: Any) -> Any:
    """vLLM's parameters for a request that wants likelihoods; it cannot but write one token."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    return VllmParams(max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False, output_kind=kind, **asked)


def next_token(finals: Sequence[int], output: Any) -> Scored:
    """vLLM lists the likeliest token, which it took, and those that were asked for."""
    completion = output.outputs[0]
    known = dict(zip(completion.logprobs.token_ids, completion.logprobs.logprobs, strict=True))
    return Scored(tuple((known[token], token == completion.token_ids[0]) for token in finals))


def prompt_end(num_scored: int, output: Any) -> tuple[float, bool]:
    """The sum over the prompt's last tokens, and whether each was the likeliest."""
    flat = output.prompt_logprobs
    assert len(flat.logprobs) == len(output.prompt_token_ids) - 1, "one figure for each token but the first"
    return math.fsum(flat.logprobs[-num_scored:]), all(rank == 1 for rank in flat.ranks[-num_scored:])


def together(parts: Sequence[Future[tuple[float, bool]]]) -> Future[Scored]:
    """Done when all are; fails with the first that fails."""
    future: Future[Scored] = Future()
    lock = threading.Lock()
    left = len(parts)

    def note(part: Future[tuple[float, bool]]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if future.done():
                return
            reason = part.exception()
            if reason is not None:
                future.set_exception(reason)
            elif not left:
                future.set_result(Scored(tuple(one.result() for one in parts)))

    for part in parts:
        part.add_done_callback(note)
    return future
