"""Stage `generate`: the teacher rewrites the seed set, on Ray Data over a pool of sampler actors.

Finished rows are kept as Parquet parts in the work directory as they arrive, so a killed run asks only for the
rows that are missing. Rows are joined by `example_id`; Ray Data keeps no order.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.generation.prompts import render_rewrite
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, node_id, remote_options
from sdft_ray.store.manifest import Usage

_BLOCK_ROWS = 64
_WITH_WORKER = pa.schema([*GENERATED_SCHEMA, ("peak_rss_bytes", pa.int64()), ("node", pa.string())])


def run(job: Job) -> Made:
    """Sample every row that no part holds yet, then store them all."""
    seed = pq.read_table(job.input("seed") / files.ROWS)
    parts = job.work() / "parts"
    parts.mkdir(exist_ok=True)
    made = Made()
    with Meter(gpus=job.resources.generate.gpus) as meter:
        finished = _finished(parts)
        job.progress(finished.num_rows, seed.num_rows, "rows")
        have = set(finished["example_id"].to_pylist())
        missing = seed.filter(pa.array([example_id not in have for example_id in seed["example_id"].to_pylist()]))
        peak = 0
        done = finished.num_rows
        nodes: set[str] = set()
        for part, peak_rss_bytes, where in _sample(job, missing):
            _append(parts, part)
            done += part.num_rows
            peak = max(peak, peak_rss_bytes)
            nodes |= where
            job.progress(done, seed.num_rows, "rows")
        table = _finished(parts)
        assert sorted(table["example_id"].to_pylist()) == sorted(seed["example_id"].to_pylist())
        with job.output(made) as directory:
            pq.write_table(table.sort_by("example_id"), directory / files.GENERATED)
    num_tokens = sum(table["response_tokens"].to_pylist())
    usage = meter.usage(num_tokens)
    made.usage = Usage(usage.wall_s, usage.device_s, usage.peak_rss_bytes + peak, num_tokens)
    made.summary = {
        "num_rows": table.num_rows,
        "finish_reasons": _counts(table["finish_reason"]),
        "nodes": sorted(nodes),
    }
    return made


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}


def _finished(parts: Path) -> pa.Table:
    """All finished rows; one row per example even if a part was written twice."""
    tables = [pq.read_table(path, schema=GENERATED_SCHEMA) for path in sorted(parts.glob("*.parquet"))]
    table = pa.concat_tables([GENERATED_SCHEMA.empty_table(), *tables])
    first: dict[str, int] = {}
    for index, example_id in enumerate(table["example_id"].to_pylist()):
        first.setdefault(example_id, index)
    return table.take(pa.array(first.values(), pa.int64()))


def _append(parts: Path, table: pa.Table) -> None:
    name = uuid.uuid4().hex
    pq.write_table(table, parts / f"{name}.partial")
    (parts / f"{name}.partial").rename(parts / f"{name}.parquet")


def _sample(job: Job, missing: pa.Table) -> Iterator[tuple[pa.Table, int, set[str]]]:
    """Stream finished rows from the pool, each batch with its actor's peak memory and node."""
    if not missing.num_rows:
        return
    settings = job.resources.generate
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray Data tells its own story on standard error; ours goes through progress events.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3
    context.execution_no_progress_timeout_s = 1800
    blocks = [missing.slice(start, _BLOCK_ROWS) for start in range(0, missing.num_rows, _BLOCK_ROWS)]
    options = remote_options(settings)
    if settings.resources:
        options["resources"] = dict(settings.resources)
    dataset = ray.data.from_arrow(blocks).map_batches(
        Rewriter,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=settings.batch_rows,
        compute=ActorPoolStrategy(min_size=settings.min_actors, max_size=settings.max_actors),
        **options,
    )
    batches: Iterable[Any] = dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0)
    for batch in batches:
        peak = max(batch["peak_rss_bytes"].to_pylist(), default=0)
        nodes = set(batch["node"].to_pylist())
        yield batch.select(GENERATED_SCHEMA.names).cast(GENERATED_SCHEMA), peak, nodes


class Rewriter:
    """One actor: the teacher in a sampler, mapped over batches of seed rows."""

    def __init__(self, job: Job) -> None:
        # One process holds engine and actor: half the start-up of vLLM's default, at the same speed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from sdft_ray.data.chat import ChatFormat, load_tokenizer

        teacher = job.model("teacher")
        self._recipe = job.recipe.generate
        self._chat = ChatFormat(load_tokenizer(teacher))
        self._sampler = _build_sampler(job, teacher)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from sdft_ray.generation.sampler import SamplingParams, row_seed

        with Meter() as meter:
            prompts = [
                self._chat.prompt_ids(
                    render_rewrite(self._recipe.template, row["instruction"], row["reference_response"])
                )
                for row in batch.select(["instruction", "reference_response"]).to_pylist()
            ]
            ids = batch["example_id"].to_pylist()
            params = SamplingParams(
                temperature=self._recipe.temperature,
                top_p=self._recipe.top_p,
                max_tokens=self._recipe.max_tokens,
            )
            seeds = [row_seed(self._recipe.seed, example_id, 0) for example_id in ids]
            samples = self._sampler.sample(prompts, params, seeds)
        peak_rss_bytes = meter.usage().peak_rss_bytes
        made: list[dict[str, Any]] = [
            {
                "example_id": example_id,
                "sample_index": 0,
                "prompt_tokens": len(prompt),
                "response": sample.text,
                "response_tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "error": sample.error,
                "peak_rss_bytes": peak_rss_bytes,
                "node": node_id(),
            }
            for example_id, prompt, sample in zip(ids, prompts, samples, strict=True)
        ]
        return pa.Table.from_pylist(made, schema=_WITH_WORKER)


def _build_sampler(job: Job, teacher: Path) -> Any:
    from sdft_ray.generation.sampler import TransformersSampler, VllmSampler

    settings = job.resources.generate
    dtype = job.recipe.teacher.dtype
    if settings.sampler == "transformers":
        return TransformersSampler(teacher, dtype=dtype, device="cuda" if settings.gpus else "cpu")
    return VllmSampler(
        teacher,
        dtype=dtype,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_model_tokens=settings.max_model_tokens,
        max_sequences=settings.max_sequences,
        enforce_eager=settings.enforce_eager,
        tensor_parallel=settings.tensor_parallel,
    )
