"""Log-probabilities from vLLM: of the tokens of a prompt, and of given tokens after it."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from sdft_ray.generation.scoring import ScoreResult


def scoring_params(**options: Any) -> Any:
    """vLLM's parameters for a scoring request; vLLM always generates at least one token."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    return VllmParams(max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False, output_kind=kind, **options)


def next_token(finals: Sequence[int], output: Any) -> ScoreResult:
    """Log-probabilities of `finals`; vLLM lists them after the most likely token, which it generated."""
    completion = output.outputs[0]
    known = dict(zip(completion.logprobs.token_ids, completion.logprobs.logprobs, strict=True))
    return ScoreResult(tuple((known[token], token == completion.token_ids[0]) for token in finals))


def prompt_end(num_scored: int, output: Any) -> tuple[float, bool]:
    """Sum of the log-probabilities of the last prompt tokens, and whether each was the most likely token."""
    flat = output.prompt_logprobs
    assert len(flat.logprobs) == len(output.prompt_token_ids) - 1, "one value for each token but the first"
    return math.fsum(flat.logprobs[-num_scored:]), all(rank == 1 for rank in flat.ranks[-num_scored:])


def together(parts: Sequence[Future[tuple[float, bool]]]) -> Future[ScoreResult]:
    """A future that is done when all parts are; it fails with the first part that fails."""
    future: Future[ScoreResult] = Future()
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
                future.set_result(ScoreResult(tuple(one.result() for one in parts)))

    for part in parts:
        part.add_done_callback(note)
    return future
