"""One actor of the pool: the teacher in a sampler, and the chunks of work that it has open."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.data.row_cache import RowCache
from sdft_ray.generation.chunks import positions_of, row_key
from sdft_ray.generation.engine_errors import cache_error
from sdft_ray.generation.sampler import EngineError, LocalSampler
from sdft_ray.recipe.recipe import Generate
from sdft_ray.stages.job import StageContext, node_id, rss_bytes
from sdft_ray.stages.samplers import prepare_process, teacher_sampler
from sdft_ray.stages.views import view
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.generation.rewriting import RewriteRequest
    from sdft_ray.generation.sampler import SamplingParams

KEY_COLUMNS = ("example_id", "instruction", "reference_response", "answer_kind", "check")
"""Columns of the seed set that shape the answers to a row, beside `context`."""
_HELD_BYTES = 256 * 2**20
"""What uncommitted rows of an actor, or rows on their way into the table, may come to."""
RECEIPT = pa.schema(
    [
        ("chunk", pa.string()),
        ("parts", pa.list_(pa.string())),
        ("num_rows", pa.int64()),
        ("num_failed", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("response_tokens", pa.int64()),
        ("first_error", pa.string()),
        ("peak_rss_bytes", pa.int64()),
        ("node", pa.string()),
        ("actor", pa.string()),
        ("ready", pa.float64()),  # when the actor's engine was loaded, seconds since the epoch
        ("engine", pa.string()),  # JSON of what ran the model; {} for samplers without one
    ]
)


class Rewriter:
    """Answers chunks of the seed set, several at a time: Ray calls it from as many threads as it may have open."""

    def __init__(self, job: StageContext, cache_url: str) -> None:
        prepare_process()
        from sdft_ray.generation.rewriting import CommitBuffer

        self._recipe = view(Generate, job.slice)
        self._rows = Rows(job.input("seed") / files.ROWS)
        self._cache = RowCache(cache_url)
        self._buffer = CommitBuffer(self._commit, rows_at_a_time(job, most=64))
        self._params = sampling_params(self._recipe)
        self._turn = threading.Lock()
        self._node = node_id()
        self._has_committed = False
        job.phase("loading the engine")
        self._refused: Exception | None = None
        try:
            self._sampler = teacher_sampler(job)
        except ValueError as reason:
            if cache_error(str(reason), "generate") is None:
                raise
            self._refused = reason  # for the first task: Ray Data would start an actor anew that dies at its start
            return
        self._engine = json.dumps(self._sampler.engine if isinstance(self._sampler, LocalSampler) else {})
        self._ready = time.time()
        self._progress = job.part(ray.get_runtime_context().get_actor_id() or "")
        self._num_answered = itertools.count(1)
        self._progress(0, 0, "rows")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The receipts of a task's chunks, all at its end.

        Ray takes up a dead actor's task at the output where it ended, so the number of outputs must not depend on
        time. One output per chunk would be as safe, and takes three times as long where the sampler is quick.
        """
        if self._refused is not None:
            raise self._refused
        try:
            receipts = [self._answer(work["chunk"], positions_of(work["runs"])) for work in batch.to_pylist()]
        except EngineError:
            if not self._has_committed:
                raise  # it would die of the same thing again
            traceback.print_exc()
            os._exit(1)  # Ray starts the actor anew only when its process is gone
        return pa.Table.from_pylist(receipts, schema=RECEIPT)

    def _answer(self, chunk: str, positions: NDArray[np.int64]) -> dict[str, Any]:
        """Answer what no part of the chunk holds yet: there are such parts when an actor died over it."""
        from sdft_ray.generation.rewriting import answer_chunk

        parts, have = [], set()
        for name in self._cache.parts_of(chunk):
            table = self._cache.read(name, ["row_key"])
            if table is not None:
                parts.append(name)
                have |= set(table["row_key"].to_pylist())
        asked = rewrite_requests(self._recipe.template, self._rows.take(positions))
        rows = [row for row in asked if row.row_key not in have]
        answered = answer_chunk(
            chunk,
            rows,
            self._sampler,
            self._params,
            self._buffer,
            seed=self._recipe.seed,
            num_samples=self._recipe.num_samples,
            parts=parts,
            turn=self._turn,
            on_row=lambda: self._progress(next(self._num_answered), 0, "rows"),
        )
        return {
            "chunk": chunk,
            "parts": answered.parts,
            "num_rows": len(positions),
            "num_failed": answered.num_failed,
            "prompt_tokens": answered.prompt_tokens,
            "response_tokens": answered.response_tokens,
            "first_error": answered.first_error,
            "peak_rss_bytes": rss_bytes(),
            "node": self._node,
            "actor": f"{self._node[:8]}/{os.getpid()}",
            "ready": self._ready,
            "engine": self._engine,
        }

    def _commit(self, chunk: str, number: int, records: list[dict[str, Any]]) -> str:
        self._has_committed = True
        return self._cache.write(chunk, number, pa.Table.from_pylist(records, schema=GENERATED_SCHEMA))


def sampling_params(asked: Generate) -> SamplingParams:
    """How a recipe has rewrites sampled."""
    from sdft_ray.generation.sampler import SamplingParams

    return SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_tokens=asked.max_tokens,
        top_logprobs=asked.top_logprobs,
        hidden_states=asked.hidden_states,
    )


def rewrite_requests(template: str, rows: Sequence[dict[str, Any]]) -> list[RewriteRequest]:
    """What is asked of the teacher for rows with `KEY_COLUMNS` and `context`."""
    from sdft_ray.data.messages import prompt_of
    from sdft_ray.generation.prompts import render_rewrite
    from sdft_ray.generation.rewriting import RewriteRequest

    return [
        RewriteRequest(
            key_of(row),
            row["example_id"],
            prompt_of(render_rewrite(template, row["instruction"], row["reference_response"]), row["context"]),
            _check(row),
        )
        for row in rows
    ]


def key_of(row: Mapping[str, str]) -> bytes:
    """See `row_key`."""
    return row_key(*(row[name] for name in KEY_COLUMNS), context=row["context"])


def rows_at_a_time(job: StageContext, *, most: int) -> int:
    """How many answered rows to hold in memory: `most`, or fewer when their signals could pass 256 MiB."""
    generate = view(Generate, job.slice)
    if not (generate.top_logprobs or generate.hidden_states):
        return most
    from sdft_ray.generation.footprint import pass_bytes

    row_bytes = pass_bytes(generate, job.teacher.fetched.config, num_rows=1).total
    assert row_bytes, "one row can be counted"
    return max(1, min(most, _HELD_BYTES // row_bytes))


class Rows:
    """Rows of a Parquet file by position; the row groups touched last stay in memory."""

    def __init__(self, path: Path, *, num_groups: int = 4) -> None:
        self._file = pq.ParquetFile(path)
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        self._num_groups = num_groups
        self._lock = threading.Lock()

    def take(self, wanted: NDArray[np.integer]) -> list[dict[str, Any]]:
        """The rows at ascending positions."""
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        taken = []
        for group in np.unique(groups):
            inside = wanted[groups == group] - self._starts[group]
            taken += self._group(int(group)).take(pa.array(inside)).to_pylist()
        return taken

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._held:
                self._held[group] = self._file.read_row_group(group, columns=[*KEY_COLUMNS, "context"])
            self._held.move_to_end(group)
            if len(self._held) > self._num_groups:
                self._held.popitem(last=False)
            return self._held[group]


def _check(row: dict[str, Any]) -> Any:
    """Whether a sample would be kept by selection."""
    from sdft_ray.generation.selection import select

    def passes(sampled: Any) -> bool:
        return select(row, sampled.text, sampled.finish_reason).source == "distilled"

    return passes
