"""What an engine is asked and what it answers, whichever engine it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


class EngineDiedError(RuntimeError):
    """The engine is of no more use; whoever holds it must be started anew."""


@dataclass(frozen=True)
class Ask:
    """One answer to one prompt. Fields mean what they mean in OpenAI's API; temperature 0 is greedy.

    `max_tokens` may be 0 where only the prompt's log-probabilities are wanted. `top_logprobs` and
    `prompt_top_logprobs` ask for that many likeliest tokens (0: the token's own value alone) at every token of the
    answer and of the prompt; they are the model's, before temperature. `stream` False: one piece, at the end.
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
    """A token, its text, its natural log-probability (None: the first of a prompt), and the likeliest in its place.

    `top` has (text, log-probability) in falling order, the token's own among them or after them.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came since the last piece. `scores` are those of its tokens, `prompt_scores` come with the first piece.

    With a draft model, the last piece tells how many tokens it proposed and how many of them the model accepted.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    num_proposed: int = 0
    num_accepted: int = 0


class Engine(Protocol):
    """One model. Answers are made side by side; leaving an iterator early ends its work."""

    max_model_tokens: int
    vocab_size: int

    def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """At least one piece; the last has a `finish_reason`. Raises `EngineDiedError`."""
        ...

    def check(self) -> None:
        """Raise `EngineDiedError` when the engine is known to be gone."""
        ...

    def close(self) -> None:
        """Stop, and give back what is held."""
        ...
