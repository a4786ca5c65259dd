"""Stage `generate`: the teacher rewrites the seed set, on Ray Data over a pool of sampler actors.

The driver cuts what is missing into chunks of 64 rows and sends descriptions of them. An actor reads its rows
from the seed set itself, keeps several chunks in its engine at once, and commits finished rows to the row
cache. Only receipts come back: texts never pass through the driver or Ray's object store, but for a sample of
the rows, which is answered first to see how many rewrites are kept. At the end all answers are written out in
the order of the seed set.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.data.row_cache import RowCache
from sdft_ray.errors import DataError
from sdft_ray.generation.chunks import CHUNK_ROWS, Keys, Ledger, keys_of, runs_of, table_keys
from sdft_ray.generation.prompts import resolve_template
from sdft_ray.recipe import resources
from sdft_ray.recipe.recipe import Generate
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.kept import COLUMNS, KeptWatch
from sdft_ray.stages.metrics import GenerationMetrics
from sdft_ray.stages.rewriter import KEY_COLUMNS, RECEIPT, Rewriter, rows_at_a_time
from sdft_ray.stages.views import view
from sdft_ray.store import files
from sdft_ray.store.fingerprint import fingerprint
from sdft_ray.store.manifest import Usage

CACHE_VERSION = 2
"""Raise it when the same teacher, prompt and sampling would give other rows."""
_WORK = pa.schema([("chunk", pa.string()), ("runs", pa.list_(pa.int32()))])
_MAX_CHUNKS_PER_TASK = 16
_KEYED_AT_A_TIME = 8192
_TELL_EVERY_S = 1.0
_ACTIVE_S = 60.0
"""An actor counts towards the pool while its last receipt is younger."""


def run(job: StageContext) -> StageResult:
    """Answer every row that no earlier run has answered, then store all answers."""
    result = StageResult()
    identity = cache_identity(job)
    cache_id = fingerprint(identity)[:16]
    with UsageMeter(gpus=job.resources.generate.gpus) as meter, job.store.lock(f"rows/{cache_id}"):
        cache = RowCache(job.store.url_of(f"rows/{cache_id}"))
        cache.claim(identity)
        job.phase("finding the rows that are answered already")
        ledger = Ledger(_keys(job.input("seed") / files.ROWS))
        damaged = _find_finished(job, cache, cache_id, ledger)
        tally = _Tally(job, ledger.num_rows, reused=ledger.num_rows - len(ledger.missing()))
        tally.tell()
        job.part("reused")(tally.reused, 0, "rows")
        watch = KeptWatch(job, ledger, view(Generate, job.slice).seed)
        for source in ledger.sources_of(watch.drawn):
            watch.look(_load(job, cache, source, COLUMNS))
        job.phase("starting an engine")
        chunks = {chunk.name: chunk.positions for chunk in ledger.chunks(watch.drawn)}
        num_drawn = -(-int(np.isin(watch.drawn, ledger.missing()).sum()) // CHUNK_ROWS)
        for receipt in _answer(job, cache.url, chunks, num_drawn):
            source = ("parts", tuple(receipt["parts"]))
            ledger.place(source, chunks.pop(receipt["chunk"]))
            tally.add(receipt)
            if watch.is_open:
                watch.look(_load(job, cache, source, COLUMNS))
        assert not chunks, "every chunk comes back once"
        job.phase("writing the rows")
        with job.output(result) as directory:
            counts = _write(job, cache, ledger, directory)
            shutil.copy(tally.log, directory / files.PROGRESS)
    usage = meter.usage(tally.response_tokens)
    result.usage = Usage(
        usage.wall_s, usage.device_s, usage.peak_rss_bytes + tally.peak_rss_bytes, tally.response_tokens
    )
    result.superseded = [
        f"rows/{cache_id}/{part}" for kind, *where in ledger.sources() if kind == "parts" for part in where[0]
    ]
    result.summary = {"row_cache": cache_id, "damaged_parts": damaged, **tally.summary(), **counts}
    return result


def cache_identity(job: StageContext) -> dict[str, Any]:
    """What an answer depends on besides its row. Names and sizes of actors, recipe and seed set are not in it."""
    asked = view(Generate, job.slice)
    return {
        "version": CACHE_VERSION,
        "teacher": job.identity["inputs"]["teacher"],
        "template": resolve_template(asked.template),
        **asked.model_dump(mode="json", by_alias=True, exclude={"template", "attempt"}),
        "replicate": job.slice.get("replicate", 1),
    }


def _keys(path: Path) -> Keys:
    with pq.ParquetFile(path) as seed:
        return keys_of(seed.iter_batches(_KEYED_AT_A_TIME, columns=[*KEY_COLUMNS, "context"]), KEY_COLUMNS)


# -- what earlier runs finished ------------------------------------------------------------------------------


def _find_finished(job: StageContext, cache: RowCache, cache_id: str, ledger: Ledger) -> int:
    """Note the rows that committed artifacts and loose parts of the cache hold; how many parts were damaged."""
    for manifest in job.store.manifests("generate"):
        if manifest.summary.get("row_cache") == cache_id:
            with pq.ParquetFile(job.store.path(manifest.address) / files.GENERATED) as table:
                for group in range(table.num_row_groups):
                    keys = table_keys(table.read_row_group(group, columns=["row_key"]))
                    ledger.find(("artifact", manifest.address, group), keys)
    damaged = 0
    for name in cache.parts():
        rows = cache.read(name, ["row_key", "status"])
        if rows is None:
            damaged += 1
        else:
            ledger.find(("parts", (name,)), table_keys(rows.filter(pc.field("status") == "ok")))
    return damaged


def _load(job: StageContext, cache: RowCache, source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a source, with all or some columns."""
    kind, *where = source
    if kind == "artifact":
        address, group = where
        with pq.ParquetFile(job.store.path(address) / files.GENERATED) as table:
            return table.read_row_group(group, columns=columns)
    tables = [cache.read(name, columns) for name in where[0]]
    assert all(table is not None for table in tables), "parts were sound when they were written or found"
    return pa.concat_tables(tables)


def _write(job: StageContext, cache: RowCache, ledger: Ledger, directory: Path) -> dict[str, Any]:
    """All answers in seed order; failed rows go to a table of their own, with the same columns."""
    reasons: Counter[str] = Counter()
    failed = 0
    with (
        pq.ParquetWriter(directory / files.GENERATED, GENERATED_SCHEMA, compression="zstd") as good,
        pq.ParquetWriter(directory / files.FAILED, GENERATED_SCHEMA, compression="zstd") as bad,
    ):
        window_rows = rows_at_a_time(job, most=4096)
        for window in ledger.assemble(lambda source: _load(job, cache, source), window_rows=window_rows):
            fine = window.filter(pc.field("status") == "ok")
            broken = window.filter(pc.field("status") != "ok")
            good.write_table(fine)
            if broken.num_rows:
                bad.write_table(broken)
            failed += len(broken["row_key"].unique())
            for entry in window["finish_reason"].value_counts().to_pylist():
                reasons[entry["values"]] += entry["counts"]
    return {"num_rows": ledger.num_rows, "num_failed": failed, "finish_reasons": dict(sorted(reasons.items()))}


# -- the pool ------------------------------------------------------------------------------------------------


def _answer(job: StageContext, cache_url: str, chunks: dict[str, Any], num_drawn: int) -> Iterator[dict[str, Any]]:
    """Stream receipts of chunks from the pool, in the order they finish."""
    if not chunks:
        return
    settings = job.resources.generate
    with DataContext.current(_data_context()):
        tasks = _tasks(chunks, chunks_per_task(len(chunks), settings), num_drawn)
        dataset = ray.data.from_blocks(tasks).map_batches(
            Rewriter,
            fn_constructor_args=(job, cache_url),
            batch_format="pyarrow",
            batch_size=None,
            compute=ActorPoolStrategy(
                min_size=settings.min_actors,
                max_size=settings.max_actors,
                max_concurrent_calls_per_actor=_calls(settings),
                enable_true_multi_threading=True,
            ),
            **remote_options(settings),
        )
    batches: Iterable[Any] = dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0)
    for batch in batches:
        yield from batch.cast(RECEIPT).to_pylist()


def _data_context() -> DataContext:
    """Settings of our data set alone: a user's own data sets in this process keep theirs."""
    context = DataContext.get_current().copy()
    # Ray Data tells its own story on standard error; ours goes through progress events.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = 1800
    context.memory_usage_poll_interval_s = None  # receipts tell it, without a thread per call
    return context


def _calls(settings: resources.Generate) -> int:
    """How many tasks an actor has open: enough that its engine always has a chunk to go on with."""
    return settings.chunks_in_flight or 2 * -(-settings.max_sequences // CHUNK_ROWS) + 1


def chunks_per_task(num_chunks: int, settings: resources.Generate) -> int:
    """Large tasks cost Ray less; small ones spread better, tell sooner how far they are, and let the pool grow."""
    return max(1, min(_MAX_CHUNKS_PER_TASK, num_chunks // (16 * _calls(settings) * settings.max_actors)))


def _tasks(chunks: dict[str, Any], per_task: int, num_alone: int) -> list[pa.Table]:
    """The first `num_alone` chunks have a task each, so that their receipts come at once."""
    names = list(chunks)
    starts = [*range(num_alone), *range(num_alone, len(names), per_task), len(names)]
    return [
        pa.table({"chunk": some, "runs": [runs_of(chunks[name]) for name in some]}, schema=_WORK)
        for some in (names[start:end] for start, end in pairwise(starts))
    ]


class _Tally:
    """Counts receipts, writes progress for people and machines, and stops the run when too much fails."""

    def __init__(self, job: StageContext, num_rows: int, *, reused: int) -> None:
        self.log = job.work() / files.PROGRESS
        self.num_failed = self.prompt_tokens = self.response_tokens = self.peak_rss_bytes = 0
        self.reused = reused
        self._job = job
        self._num_rows = num_rows
        self._answered = 0
        self._started = self._told = time.monotonic()
        self._peaks: dict[str, int] = {}
        self._last_seen: dict[str, float] = {}
        self._nodes: set[str] = set()
        self._engines: set[str] = set()
        self._first_ready: float | None = None
        self._metrics = GenerationMetrics(job.recipe_name)

    def add(self, receipt: dict[str, Any]) -> None:
        """Raises `DataError` when more rows failed than the resources allow."""
        self._metrics.count(receipt["num_rows"], receipt["num_failed"], receipt["response_tokens"])
        self._answered += receipt["num_rows"]
        self.num_failed += receipt["num_failed"]
        self.prompt_tokens += receipt["prompt_tokens"]
        self.response_tokens += receipt["response_tokens"]
        actor = receipt["actor"]
        self._peaks[actor] = max(self._peaks.get(actor, 0), receipt["peak_rss_bytes"])
        self.peak_rss_bytes = sum(self._peaks.values())
        self._last_seen[actor] = time.monotonic()
        self._nodes.add(receipt["node"])
        self._engines.add(receipt["engine"])
        self._first_ready = min(self._first_ready or receipt["ready"], receipt["ready"])
        done = self.reused + self._answered
        if time.monotonic() - self._told >= _TELL_EVERY_S or done == self._num_rows:
            self.tell()
        allowed = self._job.resources.generate.max_failed_fraction
        if self.num_failed > allowed * self._num_rows:
            raise DataError(
                f"{self.num_failed} of {self._num_rows} rows failed and generate.max_failed_fraction is {allowed:g}; "
                f"the last error: {receipt['first_error']}",
                "fix the cause and run again: finished rows are reused",
            )

    def tell(self) -> None:
        """The progress view gets rows; `progress.jsonl` gets a line."""
        now = time.monotonic()
        self._told = now
        done = self.reused + self._answered
        self._job.progress(done, self._num_rows, "rows")
        elapsed_s = max(now - self._started, 1e-9)
        left = self._num_rows - done
        actors = sum(now - seen < _ACTIVE_S for seen in self._last_seen.values())
        self._metrics.level(left, actors)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "rows": self._num_rows,
            "rows_done": done,
            "rows_reused": self.reused,
            "rows_failed": self.num_failed,
            "response_tokens": self.response_tokens,
            "tokens_per_s": round(self.response_tokens / elapsed_s, 1),
            "eta_s": round(left * elapsed_s / self._answered, 1) if self._answered else None,
            "actors": actors,
        }
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        return {
            "rows_reused": self.reused,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "nodes": sorted(self._nodes),
            "engines": [json.loads(engine) for engine in sorted(self._engines) if engine != "{}"],
            "first_ready": self._first_ready,
        }
