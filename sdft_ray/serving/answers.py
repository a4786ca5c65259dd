"""OpenAI's answers, whole and as streams of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft_ray.engines.ask import FinishReason, Piece, TokenScore

DONE = b"data: [DONE]\n\n"


@dataclass
class Sample:
    """One of the answers of a request, as far as it has come."""

    prompt_text: str = ""
    """What comes before the answer with `echo`."""
    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.num_tokens += piece.num_tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.scores += piece.scores
        self.prompt_scores += piece.prompt_scores


@dataclass(frozen=True)
class Head:
    """What every part of an answer begins with."""

    id: str
    created: int
    model: str
    fingerprint: str
    is_chat: bool

    @classmethod
    def new(cls, model: str, fingerprint: str, *, is_chat: bool) -> Head:
        return cls(
            f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint, is_chat
        )

    def fields(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if is_chunk else "chat.completion"
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**named, "system_fingerprint": self.fingerprint}


def usage(num_prompt: int, num_answer: int, num_proposed: int = 0, num_accepted: int = 0) -> dict[str, Any]:
    """Tokens, counted; with a draft model, also what it proposed, under the names that OpenAI has for predictions."""
    told: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    if num_proposed:
        rejected = num_proposed - num_accepted
        told["completion_tokens_details"] = {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": rejected,
        }
    return told


def whole(head: Head, samples: Sequence[Sample], spent: dict[str, Any], *, scored: bool) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    choices = []
    for index, sample in enumerate(samples):
        choice: dict[str, Any] = {"index": index, "finish_reason": sample.finish_reason}
        if head.is_chat:
            choice["message"] = {"role": "assistant", "content": sample.text, "refusal": None}
            choice["logprobs"] = chat_scores(sample.scores) if scored else None
        else:
            choice["text"] = sample.prompt_text + sample.text
            parts = (sample.prompt_scores, 0), (sample.scores, len(sample.prompt_text))
            choice["logprobs"] = completion_scores(*parts) if scored else None
        choices.append(choice)
    return {**head.fields(is_chunk=False), "choices": choices, "usage": spent}


class Stream:
    """Events of one request. Nearly all of an event is the same each time, so it is written once."""

    def __init__(self, head: Head, *, tells_usage: bool, scored: bool) -> None:
        self._head = head
        self._scored = scored
        self._tells_usage = tells_usage
        fields = json.dumps(head.fields(is_chunk=True))[:-1]
        self._start = f'data: {fields},"choices":[{{"index":'
        self._end = ',"usage":null}\n\n' if tells_usage else "}\n\n"
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> bytes:
        """The role, which a chat tells first."""
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return f"{self._start}{index},{delta}{self._end}".encode()

    def piece(self, index: int, piece: Piece, before: str = "") -> bytes:
        """What came for one sample; `before` is the prompt's text with `echo`."""
        scores = "null"
        if self._scored:
            parts = (piece.prompt_scores, 0), (piece.scores, self._offsets.get(index, 0) + len(before))
            scores = json.dumps(chat_scores(piece.scores) if self._head.is_chat else completion_scores(*parts))
        reason = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        text = before + piece.text
        self._offsets[index] = self._offsets.get(index, 0) + len(text)
        said = json.dumps(text)
        if self._head.is_chat:
            said = f'"delta":{{"content":{said}}}' if text or not piece.finish_reason else '"delta":{}'
        else:
            said = f'"text":{said}'
        return f'{self._start}{index},{said},"logprobs":{scores},"finish_reason":{reason}}}]{self._end}'.encode()

    def usage(self, spent: dict[str, Any]) -> bytes:
        """The last event but one, where it was asked for."""
        fields = {**self._head.fields(is_chunk=True), "choices": [], "usage": spent}
        return f"data: {json.dumps(fields)}\n\n".encode()


def chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Log-probabilities as chats tell them."""

    def told(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            {**told(score.text, score.logprob), "top_logprobs": [told(*each) for each in score.top]} for score in scores
        ],
        "refusal": None,
    }


def completion_scores(*parts: tuple[Sequence[TokenScore], int]) -> dict[str, Any]:
    """Log-probabilities as completions tell them, of parts of the text with the place where each begins.

    Of tokens that read alike, the likeliest is told.
    """
    offsets, tops = [], []
    for found, offset in parts:
        for score in found:
            offsets.append(offset)
            offset += len(score.text)
            top = {text: _finite(logprob) for text, logprob in reversed(score.top)}
            tops.append(None if score.logprob is None else top)
    scores = [score for found, _ in parts for score in found]
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's API writes -9999 for what cannot happen."""
    return logprob if logprob is None else max(logprob, -9999.0)
