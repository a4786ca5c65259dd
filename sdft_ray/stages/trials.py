"""Rewrites of a few rows by several templates, for a rehearsal: the sampler of stage `generate`, asked once for all.

All templates are sampled at the same time, so that the sampler is about as busy as in a run. Rows go to the row cache
of their template, from where a run takes them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.data.row_cache import RowCache
from sdft_ray.generation.chunks import KEY_BYTES, Ledger
from sdft_ray.generation.kept import Fits, chosen
from sdft_ray.recipe.recipe import Generate
from sdft_ray.stages.generate import cache_identity
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.rewriter import key_of, rewrite_requests, rows_at_a_time, sampling_params
from sdft_ray.stages.samplers import prepare_process, teacher_sampler
from sdft_ray.stages.select import fitting
from sdft_ray.stages.views import view
from sdft_ray.store.fingerprint import fingerprint

if TYPE_CHECKING:
    from sdft_ray.data.messages import Prompt
    from sdft_ray.generation.sampler import Sampled, Sampler, SamplingParams

Rows = Sequence[dict[str, Any]]
_TOKENS = ("prompt_tokens", "response_tokens")


@dataclass
class Completions:
    """When responses were finished, in seconds after the first was asked for, and their tokens."""

    finished_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)


class TrialWriter:
    """An actor with the workers of stage `generate`."""

    def __init__(self, job: StageContext) -> None:
        prepare_process()
        self._job = job
        self._sampler = teacher_sampler(job)

    def start_s(self, submitted: float) -> float:
        """Seconds until the sampler could be asked."""
        return time.time() - submitted

    def answer(
        self, jobs: Mapping[str, StageContext], rows: Rows
    ) -> tuple[dict[str, list[dict[str, Any]]], Completions, float]:
        """Template -> `rows` as `_judged` has them, in order; when responses came; seconds to judge a row.

        `jobs` are those of stage `generate` by template.
        """
        sampler = _Watched(self._sampler)
        turn = threading.Lock()
        with ThreadPoolExecutor(len(jobs)) as pool:
            asked = {name: pool.submit(_answers, job, rows, sampler, turn) for name, job in jobs.items()}
            answers = {name: future.result() for name, future in asked.items()}
        fits = fitting(self._job, self._job.step.row_tokens)
        began = time.perf_counter()
        judged = {name: [_judged(row, samples[key_of(row)], fits) for row in rows] for name, samples in answers.items()}
        judge_s = (time.perf_counter() - began) / max(1, len(rows) * len(jobs))
        return judged, sampler.completions, judge_s


def _judged(row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], fits: Fits) -> dict[str, Any]:
    """As selection leaves the row, with the tokens that all its samples took; what went wrong in place of a rewrite."""
    judged = chosen(row, samples, fits)
    if judged["reason"] == "error":
        judged["distilled_response"] = samples[-1]["error"]
    return {**judged, **{name: sum(sample[name] for sample in samples) for name in _TOKENS}}


def _answers(
    job: StageContext, rows: Rows, sampler: Sampler, turn: threading.Lock
) -> dict[bytes, list[dict[str, Any]]]:
    """Row key -> its samples. The chunks are named by their rows, so that a second rehearsal writes nothing twice."""
    from sdft_ray.generation.rewriting import CommitBuffer, answer_chunk

    asked = view(Generate, job.slice)
    requests = rewrite_requests(asked.template, rows)
    records: dict[bytes, list[dict[str, Any]]] = {}
    cache = _cache(job)

    def commit(chunk: str, number: int, made: list[dict[str, Any]]) -> str:
        for record in made:
            kept = {name: record[name] for name in ("response", "finish_reason", "error", *_TOKENS)}
            records.setdefault(record["row_key"], []).append(kept)
        if cache is not None and not any(name.split("-")[1] == str(number) for name in cache.parts_of(chunk)):
            cache.write(chunk, number, pa.Table.from_pylist(made, schema=GENERATED_SCHEMA))
        return ""

    keys = np.frombuffer(b"".join(request.row_key for request in requests), dtype=f"V{KEY_BYTES}")
    buffer = CommitBuffer(commit, rows_at_a_time(job, most=64))
    for chunk in Ledger(keys).chunks():
        answer_chunk(
            chunk.name,
            [requests[position] for position in chunk.positions],
            sampler,
            sampling_params(asked),
            buffer,
            seed=asked.seed,
            num_samples=asked.num_samples,
            turn=turn,
        )
    return records


def _cache(job: StageContext) -> RowCache | None:
    """The row cache of a template; None for a sampler whose responses are none."""
    if job.resources.generate.sampler == "scripted":
        return None
    identity = cache_identity(job)
    cache = RowCache(job.store.url_of(f"rows/{fingerprint(identity)[:16]}"))
    cache.claim(identity)
    return cache


class _Watched:
    """A sampler that notes when responses are finished."""

    def __init__(self, sampler: Sampler) -> None:
        self.completions = Completions()
        self._sampler = sampler
        self._began: float | None = None
        self._lock = threading.Lock()

    def submit(self, prompt: Prompt, params: SamplingParams, seed: int) -> Future[Sampled]:
        """See `Sampler.submit`."""
        with self._lock:
            self._began = self._began or time.perf_counter()
        future = self._sampler.submit(prompt, params, seed)
        future.add_done_callback(self._note)
        return future

    def close(self) -> None:
        """See `Sampler.close`."""
        self._sampler.close()

    def _note(self, future: Future[Sampled]) -> None:
        if future.cancelled() or future.exception() is not None or self._began is None:
            return
        sampled = future.result()
        with self._lock:
            self.completions.finished_s.append(time.perf_counter() - self._began)
            self.completions.prompt_tokens.append(sampled.prompt_tokens)
            self.completions.response_tokens.append(sampled.response_tokens)
