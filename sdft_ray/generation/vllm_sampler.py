"""A sampler that uses the offline engine of vLLM, stepped by its own thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdft_ray.data.chat import load_tokenizer
from sdft_ray.data.signals import Signals, top_logprobs
from sdft_ray.generation.engine_folder import EngineFolder
from sdft_ray.generation.sampler import EngineError, LocalSampler, Sampled, SamplingParams, check_signals
from sdft_ray.generation.vllm_arguments import disable_chunked_prefill
from sdft_ray.generation.vllm_scoring import next_token, prompt_end, scoring_params, together
from sdft_ray.recipe.recipe import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from sdft_ray.data.messages import ChatSettings
    from sdft_ray.generation.scoring import ScoreRequest, ScoreResult

_Request = tuple[list[int], Any, Future[Any], Callable[[Any], Any]]
"""Prompt, vLLM's parameters, the future of the caller, and the function that converts vLLM's output to its result."""


class VllmSampler(LocalSampler):
    """vLLM's offline engine over a local checkpoint.

    Continuous batching across callers: prompts join the running batch when submitted and leave it when finished. If
    VLLM_ENABLE_V1_MULTIPROCESSING=0 is in the environment before vLLM is first imported, the engine runs in this
    process and starts twice as fast; both ways give the same responses.

    Top log-probabilities come with the text. Final hidden states do not: `extract_hidden_states` with its
    `ExampleHiddenStatesConnector` (as of vLLM 0.32) is a debugging aid that needs CUDA streams, writes one file per
    request, and contains the states before the final norm. So they are refused here.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "auto",
        kv_cache_bytes: int = 256 * 2**20,
        max_model_tokens: int | None = None,
        max_sequences: int = 128,
        enforce_eager: bool = True,
        tensor_parallel: int = 1,
        chat: ChatSettings | None = None,
    ) -> None:
        """Start the engine. `kv_cache_bytes` is the size of the KV cache, not a fraction of the machine's memory.

        `max_model_tokens` (prompt plus response) defaults to the context length of the model; at most `max_sequences`
        rows are decoded at the same time.
        """
        from vllm import LLM, EngineArgs

        length: Any = max_model_tokens  # None means the context length of the model, despite vLLM's annotation
        arguments = EngineArgs(
            model=str(model_dir),
            dtype=dtype,  # type: ignore[arg-type]
            kv_cache_memory_bytes=kv_cache_bytes,
            max_model_len=length,
            max_num_seqs=max_sequences,
            enforce_eager=enforce_eager,
            tensor_parallel_size=tensor_parallel,
            trust_remote_code=False,
            max_logprobs=MAX_TOP_LOGPROBS,
            logprobs_mode="raw_logprobs",  # of the model, before temperature and truncation
        )
        disable_chunked_prefill(arguments)
        self._folder = EngineFolder()
        with self._folder.used():
            self._engine = LLM.from_engine_args(arguments).llm_engine
        super().__init__(load_tokenizer(model_dir), chat)
        config = self._engine.model_config
        self.max_model_tokens = config.max_model_len
        self.vocab_size = config.get_vocab_size()
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="vllm", daemon=True)
        self._thread.start()
        if hasattr(self._engine.engine_core, "outputs_queue"):  # the engine runs in its own process
            threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def _enqueue(self, prompt_ids: list[int], params: SamplingParams, seed: int, future: Future[Sampled]) -> None:
        check_signals("vllm", params)
        stop_ids = {*params.stop_token_ids, *self.stop_ids}
        self._waiting.put((prompt_ids, _vllm_params(params, seed, self.vocab_size, stop_ids), future, self._finish))

    def submit_score(self, request: ScoreRequest) -> Future[ScoreResult]:
        """See `LocalSampler.submit_score`. One vLLM request per final token, unless only the finals are scored.

        A sequence that fills the context loses one more token at its beginning than in the other samplers.
        """
        room = self.max_model_tokens - 1  # vLLM always generates at least one token
        if not request.num_scored:
            future: Future[ScoreResult] = Future()
            params = scoring_params(logprob_token_ids=list(request.finals))
            self._waiting.put((list(request.ids[-room:]), params, future, partial(next_token, request.finals)))
            return future
        parts: list[Future[tuple[float, bool]]] = []
        for final in request.finals:
            part: Future[tuple[float, bool]] = Future()
            finish = partial(prompt_end, request.num_scored + 1)
            self._waiting.put(([*request.ids, final][-room:], scoring_params(prompt_logprobs=0), part, finish))
            parts.append(part)
        return together(parts)

    def close(self) -> None:
        """Finish pending requests, stop the engine and free its memory."""
        self._waiting.put(None)
        self._thread.join()
        try:
            self._engine.engine_core.shutdown()
        finally:
            self._folder.close()

    def _serve(self) -> None:
        """Step the engine while there are requests. If the engine fails, all pending futures get the error."""
        running: dict[str, tuple[Future[Any], Callable[[Any], Any]]] = {}
        number = 0
        try:
            while True:
                for request in self._arrived(wait=not running):
                    if request is None and not running:
                        return
                    if request is None:
                        self._waiting.put(None)  # handled again when all requests are finished
                        break
                    prompt_ids, params, future, finish = request
                    running[str(number)] = future, finish
                    self._engine.add_request(str(number), {"prompt_token_ids": prompt_ids}, params)
                    number += 1
                for output in self._engine.step():
                    if output.finished:
                        future, finish = running.pop(output.request_id)
                        future.set_result(finish(output))
        except Exception as reason:  # noqa: BLE001  (pending futures must get any error)
            died = EngineError(f"vLLM's engine: {type(reason).__name__}: {reason}")
            died.__cause__ = reason
            self._fail(died, [future for future, _ in running.values()])

    def _watch(self) -> None:
        """Wake the stepping thread if the engine process dies.

        A step waits for the next output; if the engine process dies, vLLM 0.32 detects it and closes the connection,
        but its synchronous client keeps waiting.
        """
        client: Any = self._engine.engine_core
        while self._thread.is_alive():
            if client.resources.engine_dead:
                client.outputs_queue.put(RuntimeError("its process died"))
                return
            time.sleep(1)

    def _arrived(self, *, wait: bool) -> Iterable[_Request | None]:
        if wait:
            yield self._waiting.get()
        while not self._waiting.empty():
            yield self._waiting.get()

    def _fail(self, reason: EngineError, running: Iterable[Future[Any]]) -> None:
        for future in running:
            future.set_exception(reason)
        while (request := self._waiting.get()) is not None:  # later prompts must not wait forever
            request[2].set_exception(reason)

    def _finish(self, output: Any) -> Sampled:
        completion = output.outputs[0]
        token_ids = tuple(completion.token_ids)
        prompt_tokens = len(output.prompt_token_ids)
        reason = completion.finish_reason
        if reason not in ("stop", "length"):
            return Sampled.failed(f"the engine ended the row with {reason!r}", prompt_tokens)
        signals = self._signals(completion.logprobs, len(token_ids))
        return Sampled(self.text_of(token_ids), token_ids, reason, "", prompt_tokens, len(token_ids), signals)

    def _signals(self, flat: Any, num_tokens: int) -> Signals | None:
        """From vLLM's flat lists: per position the sampled token, then the k most likely ones."""
        if flat is None:
            return None
        ids_TK = np.asarray(flat.token_ids).reshape(num_tokens, -1)[:, 1:]
        logprobs_TK = np.asarray(flat.logprobs).reshape(num_tokens, -1)[:, 1:]
        return Signals(top=top_logprobs(ids_TK, logprobs_TK, self.vocab_size))


def _vllm_params(params: SamplingParams, seed: int, vocab_size: int, stop_ids: Iterable[int]) -> Any:
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        seed=seed if params.temperature > 0 else None,
        stop_token_ids=sorted(stop_ids),
        logprobs=min(params.top_logprobs, vocab_size) or None,
        flat_logprobs=True,  # plain lists instead of one object per token and rank
        # Detokenizing whole responses gives the same text as the other samplers and is cheaper.
        detokenize=bool(params.stop),
        stop=list(params.stop) or None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
