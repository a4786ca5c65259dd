"""OpenAI's response bodies: complete objects, and streams of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft_ray.engines.request import AnswerDelta, FinishReason, TokenScore

DONE = b"data: [DONE]\n\n"


@dataclass
class Sample:
    """One of the answers of a request, as far as it is generated."""

    prompt_text: str = ""
    """The prompt's text, which comes before the answer with `echo`; else empty."""
    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)

    def add(self, piece: AnswerDelta) -> None:
        self.text += piece.text
        self.num_tokens += piece.num_tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.scores += piece.scores
        self.prompt_scores += piece.prompt_scores


@dataclass(frozen=True)
class ResponseHeader:
    """The fields that every response object of a request begins with."""

    id: str
    created: int
    model: str
    fingerprint: str
    is_chat: bool

    @classmethod
    def new(cls, model: str, fingerprint: str, *, is_chat: bool) -> ResponseHeader:
        return cls(
            f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint, is_chat
        )

    def fields(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else "chat.completion.chunk" if is_chunk else "chat.completion"
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**named, "system_fingerprint": self.fingerprint}


def usage(num_prompt: int, num_answer: int, num_proposed: int = 0, num_accepted: int = 0) -> dict[str, Any]:
    """The `usage` object; with a draft model also its tokens, in the fields that OpenAI has for predicted outputs."""
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    if num_proposed:
        rejected = num_proposed - num_accepted
        counts["completion_tokens_details"] = {
            "accepted_prediction_tokens": num_accepted,
            "rejected_prediction_tokens": rejected,
        }
    return counts


def whole(head: ResponseHeader, samples: Sequence[Sample], spent: dict[str, Any], *, scored: bool) -> dict[str, Any]:
    """The response to a request without `stream`. `spent` is its `usage`; `scored`: with log-probabilities."""
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
    """Events of one request. Most of an event is the same each time, so that part is serialized once."""

    def __init__(self, head: ResponseHeader, *, include_usage: bool, scored: bool) -> None:
        self._head = head
        self._scored = scored
        self._tells_usage = include_usage
        fields = json.dumps(head.fields(is_chunk=True))[:-1]
        self._start = f'data: {fields},"choices":[{{"index":'
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> bytes:
        """The first event of a chat answer, which names the role."""
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return f"{self._start}{index},{delta}{self._end}".encode()

    def piece(self, index: int, piece: AnswerDelta, before: str = "") -> bytes:
        """An event with new text of one sample; `before` is the prompt's text with `echo`."""
        scores = "null"
        if self._scored:
            parts = (piece.prompt_scores, 0), (piece.scores, self._offsets.get(index, 0) + len(before))
            scores = json.dumps(chat_scores(piece.scores) if self._head.is_chat else completion_scores(*parts))
        reason = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        text = before + piece.text
        self._offsets[index] = self._offsets.get(index, 0) + len(text)
        content = json.dumps(text)
        if self._head.is_chat:
            content = f'"delta":{{"content":{content}}}' if text or not piece.finish_reason else '"delta":{}'
        else:
            content = f'"text":{content}'
        return f'{self._start}{index},{content},"logprobs":{scores},"finish_reason":{reason}}}]{self._end}'.encode()

    def usage(self, spent: dict[str, Any]) -> bytes:
        """The usage event, which comes before `[DONE]` where the client requested it."""
        fields = {**self._head.fields(is_chunk=True), "choices": [], "usage": spent}
        return f"data: {json.dumps(fields)}\n\n".encode()


def chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Log-probabilities in the format of chat completions."""

    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            {**entry(score.text, score.logprob), "top_logprobs": [entry(*each) for each in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def completion_scores(*parts: tuple[Sequence[TokenScore], int]) -> dict[str, Any]:
    """Log-probabilities in the format of completions, for parts of a text and the offset at which each begins.

    Of several tokens with the same text, only the most likely one is listed.
    """
    offsets, tops = [], []
    for part, offset in parts:
        for score in part:
            offsets.append(offset)
            offset += len(score.text)
            top = {text: _finite(logprob) for text, logprob in reversed(score.top)}
            tops.append(None if score.logprob is None else top)
    scores = [score for part, _ in parts for score in part]
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI's API writes -9999 for a token of probability zero."""
    return logprob if logprob is None else max(logprob, -9999.0)
