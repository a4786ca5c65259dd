"""One chunk: early stop, failed rows, and how little is uncommitted when a sampler dies."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.data.signals import Signals, decode_hidden, decode_top, top_logprobs
from sdft_ray.generation.rewriting import CommitBuffer, Record, RewriteRequest, answer_chunk
from sdft_ray.generation.sampler import Sampled, SamplingParams, finished, row_seed

PARAMS = SamplingParams(temperature=1.0)


class _Disk:
    """Keeps what is committed."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Record]] = {}

    def commit(self, chunk: str, number: int, records: list[Record]) -> str:
        name = f"{chunk}-{number}"
        assert name not in self.parts
        self.parts[name] = records
        return name


class _Sampler:
    """Answers with prompt and seed; `script` maps a prompt to its finish reasons, the last one repeated."""

    def __init__(self, script: dict[str, list[Any]] | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self._script = script or {}

    def submit(self, prompt: Any, params: SamplingParams, seed: int) -> Future[Sampled]:
        number = sum(earlier == prompt for earlier, _ in self.asked)
        self.asked.append((prompt, seed))
        reasons = self._script.get(prompt, ["stop"])
        reason = reasons[min(number, len(reasons) - 1)]
        if isinstance(reason, Exception):
            future: Future[Sampled] = Future()
            future.set_exception(reason)
            return future
        if reason == "error":
            return finished(Sampled.failed("refused", 3))
        return finished(Sampled(f"{prompt} {number}", (), reason, "", 3, 5))

    def close(self) -> None: ...


def _rows(*prompts: str, passes: Any = lambda sampled: True) -> list[RewriteRequest]:
    return [RewriteRequest(prompt.encode().ljust(16), prompt, prompt, passes) for prompt in prompts]


def test_each_row_is_asked_once_with_its_own_seed() -> None:
    disk, sampler = _Disk(), _Sampler()
    answered = answer_chunk("c", _rows("a", "b"), sampler, PARAMS, CommitBuffer(disk.commit), seed=3)
    assert sampler.asked == [("a", row_seed(3, "a", 0)), ("b", row_seed(3, "b", 0))]
    assert answered.parts == ["c-0"]
    assert [record["response"] for record in disk.parts["c-0"]] == ["a 0", "b 0"]
    assert (answered.num_rows, answered.num_failed, answered.prompt_tokens, answered.response_tokens) == (2, 0, 6, 10)


def test_chunks_that_take_turns_do_not_mix_in_the_queue() -> None:
    """Three threads hand in ten rows each, to a sampler that lets the others run in between."""

    class Slow(_Sampler):
        def submit(self, prompt: Any, params: SamplingParams, seed: int) -> Future[Sampled]:
            time.sleep(0.001)
            return super().submit(prompt, params, seed)

    disk, sampler, turn = _Disk(), Slow(), threading.Lock()
    buffer = CommitBuffer(disk.commit)

    def answer(chunk: str) -> None:
        rows = _rows(*(f"{chunk}{n}" for n in range(10)))
        answer_chunk(chunk, rows, sampler, PARAMS, buffer, seed=3, turn=turn)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(answer, "abc"))
    order = "".join(prompt[0] for prompt, _ in sampler.asked)
    assert sorted([order[:10], order[10:20], order[20:]]) == ["a" * 10, "b" * 10, "c" * 10]


def test_signals_become_columns() -> None:
    """Null where nothing was asked for; the row with nothing but text is as it was."""
    top = top_logprobs([[4, 2], [1, 3]], [[-1.0, -2.0], [-0.5, -3.0]], 9)
    hidden_TD = np.arange(6, dtype=np.uint16).reshape(2, 3)

    class Signalling(_Sampler):
        def submit(self, prompt: Any, params: SamplingParams, seed: int) -> Future[Sampled]:
            signals = {"a": Signals(top, hidden_TD), "b": Signals(top), "c": None}[prompt]
            return finished(Sampled(prompt, (7, 8), "stop", "", 3, 2, signals))

    disk = _Disk()
    answer_chunk("c", _rows("a", "b", "c"), Signalling(), PARAMS, CommitBuffer(disk.commit), seed=3)
    table = pa.Table.from_pylist(disk.parts["c-0"], schema=GENERATED_SCHEMA)
    assert table["response_ids"].to_pylist() == [[7, 8], [7, 8], None]
    ids, logprobs, hidden = (table[name].to_pylist() for name in ("top_ids", "top_logprobs", "hidden_states"))
    assert decode_top(ids[0], logprobs[0]).ids_TK.tolist() == [[2, 4], [1, 3]]
    assert (ids[1], logprobs[1]) == (ids[0], logprobs[0])
    assert ids[2] is logprobs[2] is None
    assert decode_hidden(hidden[0], 2).tolist() == hidden_TD.tolist()
    assert hidden[1:] == [None, None]


def test_sampling_stops_at_the_first_that_passes() -> None:
    disk, sampler = _Disk(), _Sampler()
    rows = _rows("a", passes=lambda sampled: sampled.text == "a 1") + _rows("b", passes=lambda sampled: False)
    answer_chunk("c", rows, sampler, PARAMS, CommitBuffer(disk.commit), seed=3, num_samples=4)
    made = [(record["example_id"], record["sample_index"]) for record in disk.parts["c-0"]]
    assert sorted(made) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("b", 3)]
    assert len({seed for _, seed in sampler.asked}) == 6


def test_a_failed_row_marks_all_its_samples_and_leaves_the_others_alone() -> None:
    disk = _Disk()
    sampler = _Sampler({"a": ["length", "error"]})
    rows = _rows("a", "b", passes=lambda sampled: sampled.finish_reason == "stop")
    answered = answer_chunk("c", rows, sampler, PARAMS, CommitBuffer(disk.commit), seed=0, num_samples=3)
    status = {(r["example_id"], r["sample_index"]): (r["status"], r["error"]) for r in disk.parts["c-0"]}
    assert status == {("a", 0): ("failed", ""), ("a", 1): ("failed", "refused"), ("b", 0): ("ok", "")}
    assert (answered.num_failed, answered.first_error) == (1, "refused")


def test_what_was_finished_is_committed_when_the_sampler_dies() -> None:
    disk = _Disk()
    rows, sampler = _rows("a", "b", "x"), _Sampler({"x": [RuntimeError("gone")]})
    with pytest.raises(RuntimeError, match="gone"):
        answer_chunk("c", rows, sampler, PARAMS, CommitBuffer(disk.commit), seed=0)
    assert [record["example_id"] for record in disk.parts["c-0"]] == ["a", "b"]


def test_numbers_of_parts_go_on_where_a_dead_actor_stopped() -> None:
    disk = _Disk()
    disk.parts["c-0"] = []
    answered = answer_chunk("c", _rows("b"), _Sampler(), PARAMS, CommitBuffer(disk.commit), seed=0, parts=["c-0"])
    assert answered.parts == ["c-0", "c-1"]


def test_the_buffer_never_holds_a_part_or_more() -> None:
    """Of several open chunks, the one with the most finished rows is written."""
    disk = _Disk()
    buffer = CommitBuffer(disk.commit, max_rows=5)
    for chunk in ("a", "b"):
        buffer.open(chunk)
    for number, chunk in enumerate("abbaabb"):
        buffer.add(chunk, [{"n": number}])
    assert disk.parts == {"a-0": [{"n": 0}, {"n": 3}, {"n": 4}]}
    assert buffer.close("b") == ["b-0"]
    assert [record["n"] for record in disk.parts["b-0"]] == [1, 2, 5, 6]
