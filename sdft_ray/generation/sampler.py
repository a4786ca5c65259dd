"""One method over three ways to sample from a language model: vLLM, transformers, and a script for tests.

Prompts are token ids, made once by the chat format, so no sampler can add a second BOS. A row that cannot be
sampled (empty, too long, unknown token) comes back with `finish_reason == "error"`; it never takes the batch
down. Nothing here needs torch or vLLM at import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sdft_ray.errors import RecipeError

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy and ignores `top_p`, `top_k` and the seeds.

    `top_p` in (0, 1] keeps the smallest set of tokens with at least that probability, `top_k` the k likeliest
    (0: all). `max_tokens` bounds the response. A response ends at the model's own end-of-text tokens and at
    `stop_token_ids`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises `RecipeError` on a value out of range."""
        checks = (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
        )
        for name, fine, wanted in checks:
            if not fine:
                raise RecipeError(f"{name} is {getattr(self, name)}", f"make it {wanted}")


@dataclass(frozen=True)
class Sampled:
    """One response; `text` has no special tokens.

    `token_ids` holds the end token too where `finish_reason` is "stop". `error` is "" unless `finish_reason`
    is "error"; then `text` and `token_ids` are empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str = ""


class Sampler(Protocol):
    """Anything that answers prompts."""

    def sample(
        self, prompts_ids: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sampled]:
        """One response per prompt, in order. `seeds` holds one seed per prompt, see `row_seed`."""
        ...


def row_seed(seed: int, example_id: str, sample_index: int) -> int:
    """Seed of one sample, in [0, 2**63): a hash of what it belongs to, never of where it stands."""
    digest = hashlib.sha256(f"{seed}\0{example_id}\0{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_error(prompt_ids: Sequence[int], max_model_tokens: int, vocab_size: int) -> str:
    """Why a prompt cannot be sampled, or "". The context must have room for at least one new token."""
    if not prompt_ids:
        return "the prompt is empty"
    if len(prompt_ids) >= max_model_tokens:
        return f"the prompt has {len(prompt_ids)} tokens and the context {max_model_tokens}, so no room is left"
    stray = next((token for token in prompt_ids if not 0 <= token < vocab_size), None)
    return "" if stray is None else f"token {stray} is outside the vocabulary of {vocab_size}"


def _with_errors(
    prompts_ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    error_of: Callable[[Sequence[int]], str],
    sample_good: Callable[[list[int]], list[Sampled]],
) -> list[Sampled]:
    """Sample the rows without an error (given as indices) and put every result back in its place."""
    if len(prompts_ids) != len(seeds):
        raise ValueError(f"{len(prompts_ids)} prompts but {len(seeds)} seeds")
    errors = [error_of(ids) for ids in prompts_ids]
    good = [i for i, error in enumerate(errors) if not error]
    done = dict(zip(good, sample_good(good) if good else [], strict=True))
    return [done[i] if not error else Sampled("", (), "error", error) for i, error in enumerate(errors)]


class ScriptedSampler:
    """Answers from a function, for tests and for measuring everything around a model.

    `respond` maps prompt ids to the response text. A text longer than `max_tokens` whitespace-separated words
    is cut there and finishes with "length". Token ids are word indices. An exception in `respond` is not
    caught.
    """

    def __init__(self, respond: Callable[[list[int]], str], *, max_model_tokens: int = 1 << 30) -> None:
        self._respond = respond
        self._max_model_tokens = max_model_tokens

    def sample(
        self, prompts_ids: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.sample`."""

        def answer(index: int) -> Sampled:
            text = self._respond(list(prompts_ids[index]))
            words = text.split()
            if len(words) <= params.max_tokens:
                return Sampled(text, tuple(range(len(words))), "stop")
            return Sampled(" ".join(words[: params.max_tokens]), tuple(range(params.max_tokens)), "length")

        def error_of(ids: Sequence[int]) -> str:
            return prompt_error(ids, self._max_model_tokens, 1 << 62)

        return _with_errors(prompts_ids, seeds, error_of, lambda good: [answer(i) for i in good])


class TransformersSampler:
    """A transformers model in this process, for machines without vLLM and for comparison with it.

    Sampled rows are reproducible from their seeds and do not depend on what else is in the batch; the same
    seed draws other tokens than it does in vLLM. Greedy rows agree with vLLM up to rounding.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        max_model_tokens: int | None = None,
        max_sequences: int = 32,
    ) -> None:
        """Load model and tokenizer. Raises `ModelError` as `load_model` does.

        `dtype` is "auto" (that of the checkpoint), "float32", "bfloat16" or "float16". `max_model_tokens` and
        `max_sequences` are as for `VllmSampler`.
        """
        from sdft_ray.data.chat import load_tokenizer
        from sdft_ray.models.loading import load_model

        model: Any = load_model(Path(model_dir), dtype)
        self._model = model.to(device)
        self._tokenizer: Any = load_tokenizer(Path(model_dir))
        config = self._model.config.get_text_config()
        self._max_model_tokens: int = max_model_tokens or config.max_position_embeddings
        self._vocab_size: int = config.vocab_size
        self._max_sequences = max_sequences
        ends = self._model.generation_config.eos_token_id
        own = [ends] if isinstance(ends, int) else list(ends or [])
        self._end_ids = {*own, self._tokenizer.eos_token_id} - {None}

    def sample(
        self, prompts_ids: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.sample`."""
        from sdft_ray.generation.decoding import decode

        stop_ids = self._end_ids | set(params.stop_token_ids)

        def sample_good(good: list[int]) -> list[Sampled]:
            by_length = sorted(good, key=lambda i: len(prompts_ids[i]), reverse=True)
            done: dict[int, Sampled] = {}
            for start in range(0, len(by_length), self._max_sequences):
                batch = by_length[start : start + self._max_sequences]
                decoded = decode(
                    self._model,
                    [prompts_ids[i] for i in batch],
                    params,
                    [seeds[i] for i in batch],
                    stop_token_ids=stop_ids,
                    max_model_tokens=self._max_model_tokens,
                )
                for i, (token_ids, reason) in zip(batch, decoded, strict=True):
                    text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
                    done[i] = Sampled(text, tuple(token_ids), reason)
            return [done[i] for i in good]

        def error_of(ids: Sequence[int]) -> str:
            return prompt_error(ids, self._max_model_tokens, self._vocab_size)

        return _with_errors(prompts_ids, seeds, error_of, sample_good)


class VllmSampler:
    """vLLM's offline engine over a local checkpoint; continuous batching inside one `sample` call.

    With VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment before vLLM is first imported, the engine runs in
    this process and starts twice as fast; that is the caller's choice, and both ways give the same responses.
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
    ) -> None:
        """Start the engine. `kv_cache_bytes` is what the key-value cache takes, never a share of the machine.

        `max_model_tokens` (prompt and response together) defaults to the model's own context; `max_sequences`
        rows are decoded together at most.
        """
        from vllm import LLM

        self._llm = LLM(
            model=str(model_dir),
            dtype=dtype,  # type: ignore[arg-type]
            kv_cache_memory_bytes=kv_cache_bytes,
            max_model_len=max_model_tokens,
            max_num_seqs=max_sequences,
            enforce_eager=enforce_eager,
            tensor_parallel_size=tensor_parallel,
            trust_remote_code=False,
        )
        self._tokenizer: Any = self._llm.get_tokenizer()
        config = self._llm.llm_engine.model_config
        self._max_model_tokens: int = config.max_model_len
        self._vocab_size: int = config.get_vocab_size()

    def sample(
        self, prompts_ids: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.sample`. Raises vLLM's `EngineDeadError` when the engine is gone."""
        from vllm import SamplingParams as VllmParams
        from vllm import TokensPrompt

        def row_params(index: int) -> VllmParams:
            return VllmParams(
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                max_tokens=params.max_tokens,
                seed=seeds[index] if params.temperature > 0 else None,
                stop_token_ids=list(params.stop_token_ids),
                # Decoding whole responses below gives the same text as the other samplers, and costs less.
                detokenize=False,
            )

        def sample_good(good: list[int]) -> list[Sampled]:
            prompts = [TokensPrompt(prompt_token_ids=list(prompts_ids[i])) for i in good]
            outputs = self._llm.generate(prompts, [row_params(i) for i in good], use_tqdm=False)
            return [self._finish(output.outputs[0]) for output in outputs]

        def error_of(ids: Sequence[int]) -> str:
            return prompt_error(ids, self._max_model_tokens, self._vocab_size)

        return _with_errors(prompts_ids, seeds, error_of, sample_good)

    def _finish(self, completion: Any) -> Sampled:
        token_ids = tuple(completion.token_ids)
        reason = completion.finish_reason
        if reason not in ("stop", "length"):
            return Sampled("", (), "error", f"the engine ended the row with {reason!r}")
        return Sampled(self._tokenizer.decode(token_ids, skip_special_tokens=True), token_ids, reason)

    def close(self) -> None:
        """Stop the engine and give its memory back. The sampler is of no use afterwards."""
        self._llm.llm_engine.engine_core.shutdown()
