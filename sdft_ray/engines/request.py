"""The interface of an inference engine: requests, pieces of answers, and the `Engine` protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from sdft_ray.models.precision import Precision

FinishReason = Literal["stop", "length"]


class EngineFailedError(RuntimeError):
    """The engine has failed and cannot be used again; the process that holds it must be restarted."""


@dataclass(frozen=True)
class GenerationRequest:
    """A request for one answer to one prompt. Fields have the meaning of OpenAI's API; temperature 0 is greedy.

    `max_tokens` may be 0, to get only the prompt's log-probabilities. `top_logprobs` and `prompt_top_logprobs`: number
    of most likely tokens to return for every token of the answer and of the prompt (0: only the token's own value;
    None: no log-probabilities). They are the model's, before temperature. Without `stream`, there is one piece, at the
    end.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    prompt_top_logprobs: int | None = None
    stream: bool = False


@dataclass(frozen=True)
class TokenScore:
    """A token's text, its natural log-probability (None for the first of a prompt), and the most likely alternatives.

    `top` has (text, log-probability) in descending order; the token itself is among them or last.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AnswerDelta:
    """New text of an answer. `scores` belong to its tokens; `prompt_scores` come with the first piece.

    With a draft model, the last piece has the numbers of proposed and of accepted tokens.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    num_proposed: int = 0
    num_accepted: int = 0


class Engine(Protocol):
    """One model. It generates answers concurrently; closing an iterator early cancels its answer."""

    max_model_tokens: int
    vocab_size: int
    precision: Precision | None
    """None where the engine did not choose it."""

    def answer(self, ask: GenerationRequest) -> AsyncGenerator[AnswerDelta, None]:
        """Yields at least one piece; the last has a `finish_reason`. Raises `EngineFailedError`."""
        ...

    def check(self) -> None:
        """Raises `EngineFailedError` if the engine has failed."""
        ...

    def close(self) -> None:
        """Stop the engine and release its memory."""
        ...
