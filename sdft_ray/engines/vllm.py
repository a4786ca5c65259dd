"""vLLM behind asyncio, with continuous batching; on most machines its engine core is a separate process."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sdft_ray.data.chat import load_tokenizer, stop_ids
from sdft_ray.engines.request import AnswerDelta, EngineFailedError, GenerationRequest, TokenScore
from sdft_ray.engines.settings import EngineSettings
from sdft_ray.generation.engine_folder import EngineFolder
from sdft_ray.generation.vllm_arguments import disable_chunked_prefill
from sdft_ray.models.environment import variable
from sdft_ray.models.precision import Precision, precision_of
from sdft_ray.progress.killed import killed

MAX_TOP_LOGPROBS = 20
"""As in OpenAI's API."""


class VllmEngine:
    """`AsyncLLM` over a local checkpoint, with speculative decoding where a draft model is given."""

    def __init__(self, llm: Any, folder: EngineFolder, stop_ids: Collection[int], precision: Precision) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.precision: Precision | None = precision
        self._llm = llm
        self._folder = folder
        self._stop_ids = sorted(stop_ids)
        self._dead: type[BaseException] = EngineDeadError
        self._numbers = itertools.count()
        config = llm.model_config
        self.max_model_tokens: int = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()

    @classmethod
    def start(
        cls,
        model_dir: str | Path,
        settings: EngineSettings,
        draft: tuple[str | Path, int] | None = None,
        cpus: float = 2.0,
    ) -> VllmEngine:
        """Start the engine, and return when it is ready. Call it in the event loop that will send the requests.

        `draft`: directory of a smaller model with the same vocabulary, and the number of tokens that it proposes per
        step. `cpus`: CPUs of the engine on a machine without a GPU.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        speculative: dict[str, Any] = {}
        if draft is not None:
            speculative = {
                "speculative_config": {"model": str(draft[0]), "num_speculative_tokens": draft[1]},
                "per_request_spec_decode_metrics": "summary",
            }
        precision = precision_of(
            settings.dtype,
            Path(model_dir),
            kv_cache_bytes=settings.kv_cache_bytes,
            draft=Path(draft[0]) if draft else None,
        )
        length: Any = settings.max_model_tokens  # None: the model's maximum; the annotation is wrong
        arguments = AsyncEngineArgs(
            model=str(model_dir),
            dtype=precision.dtype,  # type: ignore[arg-type]
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            max_model_len=length,
            max_num_seqs=settings.max_sequences,
            enforce_eager=settings.enforce_eager,
            tensor_parallel_size=settings.tensor_parallel,
            max_logprobs=MAX_TOP_LOGPROBS,
            logprobs_mode="raw_logprobs",  # before temperature and penalties
            generation_config="vllm",  # defaults are OpenAI's, not those of the model's generation_config.json
            trust_remote_code=False,
            enable_log_requests=False,
            **speculative,
        )
        disable_chunked_prefill(arguments)
        is_alone = current_platform.is_cpu() and settings.tensor_parallel == 1 and cpus < 2
        folder = EngineFolder()
        with _in_one_process(is_alone), folder.used():
            llm = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
            return cls(llm, folder, stop_ids(load_tokenizer(model_dir)), precision)

    async def answer(self, ask: GenerationRequest) -> AsyncGenerator[AnswerDelta, None]:
        """See `Engine.answer`."""
        outputs = self._llm.generate(
            {"prompt_token_ids": list(ask.prompt_ids)}, _sampling_params(ask, self._stop_ids), str(next(self._numbers))
        )
        first = True
        try:
            async for output in outputs:
                yield _piece(output, ask, first=first)
                first = False
        except self._dead as reason:
            raise EngineFailedError(_failure(self._llm, reason)) from reason
        finally:
            await outputs.aclose()

    def check(self) -> None:
        """See `Engine.check`."""
        if self._llm.errored:
            raise EngineFailedError(_failure(self._llm, self._llm.dead_error))

    def close(self) -> None:
        """See `Engine.close`."""
        try:
            self._llm.shutdown()
        finally:
            self._folder.close()


def _failure(llm: Any, reason: BaseException) -> str:
    """Why an engine failed; of one in a process of its own also the signal that killed that."""
    ended: tuple[str, str] | None = None
    with suppress(AttributeError):  # an engine in this process has no such manager
        codes = llm.engine_core.resources.engine_manager.finished_procs()
        ended = killed(f"exit codes: {codes}")
    return f"vLLM's engine was {ended[0]}: {ended[1]}" if ended else f"vLLM's engine failed: {reason}"


def _in_one_process(is_wanted: bool) -> AbstractContextManager[None]:
    """Run vLLM's scheduler and worker in one process if `is_wanted`.

    By default they are two processes that use two cores, half of that waiting for each other. With one core, one
    process has the higher throughput (measured by `jobs/bench/serve.py`).
    """
    # vLLM reads it when it makes the engine's configuration.
    return variable("VLLM_ENABLE_V1_MULTIPROCESSING", "0") if is_wanted else nullcontext()


def _sampling_params(ask: GenerationRequest, stop_ids: list[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max(1, ask.max_tokens),
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        seed=ask.seed,
        stop=list(ask.stop),
        stop_token_ids=stop_ids,
        logprobs=ask.top_logprobs,
        prompt_logprobs=ask.prompt_top_logprobs,
        output_kind=RequestOutputKind.DELTA if ask.stream else RequestOutputKind.FINAL_ONLY,
    )


def _piece(output: Any, ask: GenerationRequest, *, first: bool) -> AnswerDelta:
    result = output.outputs[0]
    prompt_scores: tuple[TokenScore, ...] = ()
    if first and ask.prompt_top_logprobs is not None:
        prompt_scores = _scores(ask.prompt_ids, output.prompt_logprobs, ask.prompt_top_logprobs)
    if ask.max_tokens == 0:  # vLLM generates at least one token
        return AnswerDelta("", 0, "length" if output.finished else None, (), prompt_scores)
    scores: tuple[TokenScore, ...] = ()
    if ask.top_logprobs is not None:
        scores = _scores(result.token_ids, result.logprobs, ask.top_logprobs)
    reason = result.finish_reason if output.finished else None
    return AnswerDelta(result.text, len(result.token_ids), reason, scores, prompt_scores, *_draft_counts(result))


def _draft_counts(result: Any) -> tuple[int, int]:
    """Numbers of proposed and of accepted draft tokens; vLLM reports them at the end of an answer."""
    metrics = result.spec_decode_metrics
    if metrics is None or result.finish_reason is None:
        return 0, 0
    return metrics.num_draft_tokens, sum(accepted * steps for accepted, steps in enumerate(metrics.histogram))


def _scores(
    token_ids: Sequence[int], positions: Sequence[Mapping[int, Any] | None], num_top: int
) -> tuple[TokenScore, ...]:
    """Convert vLLM's log-probabilities, which hold the token's own value beside the most likely ones."""
    scores = []
    for token_id, position in zip(token_ids, positions, strict=True):
        if position is None:
            scores.append(TokenScore("", None))
            continue
        own = position[token_id]
        ranked = sorted(position.values(), key=lambda score: -score.logprob)
        top = tuple((score.decoded_token or "", score.logprob) for score in ranked[: max(num_top, 0)])
        scores.append(TokenScore(own.decoded_token or "", own.logprob, top))
    return tuple(scores)
