"""Samples one chunk of rows and commits finished rows early, so that a crash loses little."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from sdft_ray.data.messages import Prompt
from sdft_ray.data.signals import encode_hidden, encode_top
from sdft_ray.generation.sampler import Sampled, Sampler, SamplingParams, row_seed

Record = dict[str, Any]
"""One sample of one row, as a row of `GENERATED_SCHEMA`."""


@dataclass(frozen=True)
class RewriteRequest:
    """One seed row to sample: key, id, prompt and the check that a sample must pass."""

    row_key: bytes
    example_id: str
    prompt: Prompt
    passes: Callable[[Sampled], bool]


@dataclass
class RewriteResult:
    """Result of a chunk: its parts in the row cache, and token counts."""

    parts: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_failed: int = 0
    num_samples: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    first_error: str = ""


class CommitBuffer:
    """Finished rows of all chunks that a worker has open, at most `max_rows` of them uncommitted.

    `commit` maps the name of a chunk, the index of the part and its records to the name of the part. When the buffer is
    full, the chunk with the most finished rows is written, so that parts are as large as possible.
    """

    def __init__(self, commit: Callable[[str, int, list[Record]], str], max_rows: int = 64) -> None:
        self._commit = commit
        self._max_rows = max_rows
        self._lock = threading.Lock()
        self._finished: dict[str, list[list[Record]]] = {}
        self._parts: dict[str, list[str]] = {}

    def open(self, chunk: str, parts: Sequence[str] = ()) -> None:
        """Start a chunk of which `parts` are committed already."""
        with self._lock:
            self._finished[chunk] = []
            self._parts[chunk] = list(parts)

    def add(self, chunk: str, samples: list[Record]) -> None:
        """Add all samples of one finished row."""
        with self._lock:
            self._finished[chunk].append(samples)
            if sum(map(len, self._finished.values())) >= self._max_rows:
                self._write(max(self._finished, key=lambda name: len(self._finished[name])))

    def close(self, chunk: str) -> list[str]:
        """Commit the rest of a chunk; returns the names of all its parts."""
        with self._lock:
            if self._finished[chunk]:
                self._write(chunk)
            del self._finished[chunk]
            return self._parts.pop(chunk)

    def _write(self, chunk: str) -> None:
        records = [record for samples in self._finished[chunk] for record in samples]
        self._parts[chunk].append(self._commit(chunk, len(self._parts[chunk]), records))
        self._finished[chunk] = []


def answer_chunk(
    name: str,
    rows: Sequence[RewriteRequest],
    sampler: Sampler,
    params: SamplingParams,
    buffer: CommitBuffer,
    *,
    seed: int,
    num_samples: int = 1,
    parts: Sequence[str] = (),
    turn: AbstractContextManager[Any] | None = None,
    on_row: Callable[[], None] | None = None,
) -> RewriteResult:
    """Sample every row until a sample passes, at most `num_samples` times; rows finish in any order.

    `on_row` is called after each.

    `turn` is entered while the rows are submitted. With one lock for all chunks of a sampler, their rows do not mix in
    its queue, so chunks finish one after another and are replaced by new ones. Mixed chunks would all finish at the
    same time and leave the sampler idle.

    Finished rows are committed even if the sampler dies; its exception is then re-raised.
    """
    answered = RewriteResult(num_rows=len(rows))
    finished: queue.SimpleQueue[tuple[int, int, Any]] = queue.SimpleQueue()
    samples: list[list[Record]] = [[] for _ in rows]

    def submit(index: int, sample_index: int) -> None:
        seed_of_sample = row_seed(seed, rows[index].example_id, sample_index)
        future = sampler.submit(rows[index].prompt, params, seed_of_sample)
        future.add_done_callback(lambda done: finished.put((index, sample_index, done)))

    buffer.open(name, parts)
    try:
        with turn or nullcontext():
            for index in range(len(rows)):
                submit(index, 0)
        num_open = len(rows)
        while num_open:
            index, sample_index, done = finished.get()
            sampled: Sampled = done.result()
            row = rows[index]
            samples[index].append(_record(row, sample_index, sampled))
            _count(answered, sampled)
            if sampled.finish_reason != "error" and sample_index + 1 < num_samples and not row.passes(sampled):
                submit(index, sample_index + 1)
                continue
            if sampled.finish_reason == "error":
                for record in samples[index]:
                    record["status"] = "failed"
            buffer.add(name, samples[index])
            num_open -= 1
            if on_row is not None:
                on_row()
    finally:
        answered.parts = buffer.close(name)
    return answered


def _record(row: RewriteRequest, sample_index: int, sampled: Sampled) -> Record:
    return {
        "row_key": row.row_key,
        "example_id": row.example_id,
        "sample_index": sample_index,
        "prompt_tokens": sampled.prompt_tokens,
        "response": sampled.text,
        "response_tokens": sampled.response_tokens,
        "finish_reason": sampled.finish_reason,
        "status": "ok",
        "error": sampled.error,
        **_signal_columns(sampled),
    }


def _signal_columns(sampled: Sampled) -> Record:
    """Signal columns; None unless signals were requested and the row was sampled."""
    signals = sampled.signals
    if signals is None:
        return dict.fromkeys(("response_ids", "top_ids", "top_logprobs", "hidden_states"))
    ids, logprobs = (None, None) if signals.top is None else encode_top(signals.top)
    hidden = None if signals.hidden_TD is None else encode_hidden(signals.hidden_TD)
    return {
        "response_ids": list(sampled.token_ids),
        "top_ids": ids,
        "top_logprobs": logprobs,
        "hidden_states": hidden,
    }


def _count(answered: RewriteResult, sampled: Sampled) -> None:
    answered.num_samples += 1
    answered.prompt_tokens += sampled.prompt_tokens
    answered.response_tokens += sampled.response_tokens
    if sampled.finish_reason == "error":
        answered.num_failed += 1
        answered.first_error = answered.first_error or sampled.error
