"""One interface to several samplers: vLLM, transformers, an OpenAI-compatible server, and a scripted one for tests.

`submit` takes a prompt and returns a future, so a sampler can process many prompts at once and finish them in any
order. A prompt that cannot be sampled (empty, too long, refused) gives a result with `finish_reason == "error"` and
does not affect other prompts. A future raises only if the sampler itself is unusable; `EngineError` means that a new
sampler may work. This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sdft_ray.data.messages import Prompt, messages_of
from sdft_ray.errors import DataError, ModelError, RecipeError, ResourceError
from sdft_ray.recipe.recipe import MAX_TOP_LOGPROBS, Generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sdft_ray.data.messages import ChatSettings
    from sdft_ray.data.signals import Signals
    from sdft_ray.generation.scoring import ScoreRequest, ScoreResult

FinishReason = Literal["stop", "length", "error"]

_WHY_NOT = {
    ("vllm", "hidden_states"): "vLLM exposes them only through a CUDA-only connector, and before the final norm",
    ("server", "top_logprobs"): "a server returns the texts of a few likely tokens, not their ids",
    ("server", "hidden_states"): "a server does not return them",
    ("scripted", "top_logprobs"): "it runs no model",
    ("scripted", "hidden_states"): "it runs no model",
}
"""Signals that a sampler cannot provide, and why. One text may have several token ids, so ids cannot be inferred."""


class EngineError(RuntimeError):
    """The engine of a sampler has died, and with it all pending requests."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. Temperature 0 is greedy and ignores `top_p`, `top_k` and the seeds.

    `top_p` in (0, 1] keeps the smallest set of tokens with at least that probability, `top_k` the k most likely tokens
    (0: all). `max_tokens` limits the response. A response ends at the model's end-of-sequence tokens, at the end of
    turn of its chat template, at `stop_token_ids`, and where its text contains one of the `stop` texts; it then
    includes that text, and possibly the rest of the token in which it ends.
    `top_logprobs` (0 to 128; at most the vocabulary) and `hidden_states` request
    `Signals`, whose values do not depend on the other fields, except through the sampled tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    hidden_states: bool = False

    @property
    def needs_signals(self) -> bool:
        return bool(self.top_logprobs or self.hidden_states)

    def __post_init__(self) -> None:
        """Raises `RecipeError` on a value out of range."""
        checks = (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("top_logprobs", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
        )
        for name, valid, allowed in checks:
            if not valid:
                raise RecipeError(f"{name} is {getattr(self, name)}", f"make it {allowed}")


@dataclass(frozen=True)
class Sampled:
    """One response; `text` has no special tokens.

    `token_ids` includes the end token if `finish_reason` is "stop"; a server returns only their number,
    `response_tokens`. `error` is "" unless `finish_reason` is "error"; then `text` and `token_ids` are empty. `signals`
    has one position per token of `token_ids`; None unless requested.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str = ""
    prompt_tokens: int = 0
    response_tokens: int = 0
    signals: Signals | None = None

    @classmethod
    def failed(cls, error: str, prompt_tokens: int = 0) -> Sampled:
        """The result for a prompt that could not be sampled."""
        return cls("", (), "error", error, prompt_tokens)


class Sampler(Protocol):
    """Generates responses to prompts, many at a time. Methods may be called from any thread."""

    def submit(self, prompt: Prompt, params: SamplingParams, seed: int) -> Future[Sampled]:
        """Request one response to a prompt. `seed` is the seed of the sample, see `row_seed`.

        Raises `ResourceError` for signals that this sampler cannot provide.
        """
        ...

    def close(self) -> None:
        """Stop and release all resources. The sampler cannot be used afterwards."""
        ...


def check_signals(sampler: str, params: SamplingParams | Generate) -> None:
    """Raise `ResourceError` if `sampler` (its name in the resources) cannot provide the requested signals."""
    for signal in ("top_logprobs", "hidden_states"):
        why = _WHY_NOT.get((sampler, signal))
        if getattr(params, signal) and why:
            raise ResourceError(
                f"the {sampler} sampler cannot provide generate.{signal}: {why}",
                f"set generate.sampler: transformers in the resources, or remove {signal} from the recipe",
            )


def row_seed(seed: int, example_id: str, sample_index: int) -> int:
    """Seed of one sample, in [0, 2**63): a hash of the row and the sample index, independent of the row's position."""
    digest = hashlib.sha256(f"{seed}\0{example_id}\0{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_error(prompt_ids: Sequence[int], max_model_tokens: int, vocab_size: int) -> str:
    """Why a prompt cannot be sampled, or "". The context must have room for at least one new token."""
    if not prompt_ids:
        return "the prompt is empty"
    if len(prompt_ids) >= max_model_tokens:
        return f"the prompt has {len(prompt_ids)} tokens, which leaves no room in the context of {max_model_tokens}"
    stray = next((token for token in prompt_ids if not 0 <= token < vocab_size), None)
    return "" if stray is None else f"token {stray} is outside the vocabulary of {vocab_size}"


class LocalSampler:
    """Base class of samplers with a local model. Prompts are tokenized once, by the chat format, so with one BOS.

    A model without a usable chat template takes token ids only.
    """

    max_model_tokens: int
    vocab_size: int
    engine: dict[str, str]
    """What runs the model, for people: set by who starts it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatSettings | None = None) -> None:
        from sdft_ray.data.chat import ChatFormat, end_of_text

        self._tokenizer: Any = tokenizer
        self.engine = {}
        self._chat: ChatFormat | ModelError
        try:
            self._chat = ChatFormat(tokenizer, chat)
            self.stop_ids = self._chat.stop_ids
        except ModelError as reason:
            self._chat = reason
            self.stop_ids = end_of_text(tokenizer)
        self._tokenizing = threading.Lock()  # a call to a tokenizer changes its state

    def submit(self, prompt: Prompt, params: SamplingParams, seed: int) -> Future[Sampled]:
        """See `Sampler.submit`. Raises `ModelError` where there is no usable chat template."""
        if isinstance(self._chat, ModelError):
            raise self._chat
        try:
            with self._tokenizing:
                ids = self._chat.prompt_ids(prompt)
        except DataError as reason:
            return finished(Sampled.failed(reason.message))
        return self.submit_ids(ids, params, seed)

    def submit_ids(self, prompt_ids: Sequence[int], params: SamplingParams, seed: int) -> Future[Sampled]:
        """Request one response to a prompt of token ids."""
        error = prompt_error(prompt_ids, self.max_model_tokens, self.vocab_size)
        if error:
            return finished(Sampled.failed(error, len(prompt_ids)))
        future: Future[Sampled] = Future()
        self._enqueue(list(prompt_ids), params, seed, future)
        return future

    def sample(
        self, prompts_ids: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Sampled]:
        """One response per prompt, in order; waits for all."""
        if len(prompts_ids) != len(seeds):
            raise ValueError(f"{len(prompts_ids)} prompts but {len(seeds)} seeds")
        futures = [self.submit_ids(ids, params, seed) for ids, seed in zip(prompts_ids, seeds, strict=True)]
        return [future.result() for future in futures]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The decoded text of a response, without special tokens and without the token that ended it."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_ids
        with self._tokenizing:
            return self._tokenizer.decode(list(token_ids[:-1] if ended else token_ids), skip_special_tokens=True)

    def submit_score(self, request: ScoreRequest) -> Future[ScoreResult]:
        """Request the log-probabilities of given tokens, which must fit the context and be in the vocabulary."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Sampler.close`."""
        raise NotImplementedError

    def _enqueue(self, prompt_ids: list[int], params: SamplingParams, seed: int, future: Future[Sampled]) -> None:
        raise NotImplementedError


def finished(sampled: Sampled) -> Future[Sampled]:
    """A future that already has its result."""
    future: Future[Sampled] = Future()
    future.set_result(sampled)
    return future


def digest_words(prompt: str) -> str:
    """The default response of the scripted sampler: eight words that depend on every character of the prompt."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
    return " ".join(digest[start : start + 8] for start in range(0, 64, 8))


class ScriptedSampler:
    """Returns the value of a function, for dry runs, tests and overhead measurements. No signals.

    `respond` maps a prompt (of several messages, their JSON) to the response, after `delay_s` seconds. A text of more
    than `max_tokens` words (separated by single spaces) is truncated and finishes with "length". Words count as tokens.
    An exception in `respond` is not caught.
    """

    def __init__(self, respond: Callable[[str], str] = digest_words, *, delay_s: float = 0.0) -> None:
        self._respond = respond
        self._delay_s = delay_s

    def submit(self, prompt: Prompt, params: SamplingParams, seed: int) -> Future[Sampled]:
        """See `Sampler.submit`."""
        del seed
        check_signals("scripted", params)
        if self._delay_s:
            time.sleep(self._delay_s)
        text = prompt if isinstance(prompt, str) else json.dumps(messages_of(prompt), ensure_ascii=False)
        words = self._respond(text).split(" ")
        reason: FinishReason = "stop" if len(words) <= params.max_tokens else "length"
        words = words[: params.max_tokens]
        num_prompt = text.count(" ") + 1
        return finished(Sampled(" ".join(words), (), reason, "", num_prompt, len(words)))

    def close(self) -> None:
        """Nothing to release."""
