"""Requests of an evaluation to a model, and its answers: token ids in, plain values out.

A request is self-contained: its answer does not depend on where or by which engine it is computed, so answers can be
cached by request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoglikelihoodQuestion:
    """A request for the likelihoods of continuations of one context that differ only in their last token.

    The model reads `ids` (at least one), of which the last `num_scored` belong to the continuations; each of `finals`
    is the token after them.
    """

    ids: tuple[int, ...]
    num_scored: int
    finals: tuple[int, ...]


@dataclass(frozen=True)
class Likelihoods:
    """For each of `finals`: log-probability of its continuation in nats, and whether greedy decoding would give it."""

    finals: tuple[tuple[float, bool], ...]


@dataclass(frozen=True)
class GenerationQuestion:
    """A request to generate after `ids` until a text of `stop`, the end of the text, or `max_tokens` tokens.

    Temperature 0 is greedy decoding.
    """

    ids: tuple[int, ...]
    stop: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    is_cut: bool = False
    """Whether the beginning of the prompt was truncated."""


@dataclass(frozen=True)
class Text:
    """A generated text without special tokens; a stop text may still be at the end.

    `num_tokens` and `repetition` (see `scores.GenerationStats`) are those of the generated tokens. `truncated`: it
    ended at `max_tokens` or at the end of the context.
    """

    text: str
    num_tokens: int
    truncated: bool
    repetition: float


Question = LoglikelihoodQuestion | GenerationQuestion
Answer = Likelihoods | Text
Ask = Callable[[Sequence[Question]], Iterator[tuple[int, Answer]]]
"""Yields (index of the question, answer) in any order. Raises if a question cannot be answered."""


def key_of(question: Question) -> str:
    """A digest of all fields of a question."""
    named = [type(question).__name__, asdict(question)]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """Plain data for `json.dumps`."""
    return asdict(answer)


def answer_from_json(data: dict[str, Any]) -> Answer:
    """The inverse of `answer_to_json`."""
    if "finals" in data:
        return Likelihoods(tuple((float(logprob), bool(greedy)) for logprob, greedy in data["finals"]))
    return Text(**data)


def repetition(ids: Sequence[int], length: int = 4) -> float:
    """Share of token sequences of `length` that occurred earlier in the same text, in [0, 1): seq-rep-n of
    arXiv:1908.04319. 0 for texts shorter than that."""
    count = len(ids) - length + 1
    if count <= 0:
        return 0.0
    return 1 - len({tuple(ids[start : start + length]) for start in range(count)}) / count
