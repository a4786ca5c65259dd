"""Stage `select`: conditional selection. Keep a rewrite when its answer checks, else the reference, and say why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.example import SELECTED_SCHEMA
from sdft_ray.data.messages import row_prompt
from sdft_ray.generation.kept import Fits, Kept, chosen
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.spec import STAGES
from sdft_ray.store import files


def run(job: StageContext) -> StageResult:
    """One light task: answer checks are text, and take microseconds a row."""
    return ray.get(ray.remote(_select).options(num_cpus=STAGES["select"].extra_cpus, max_retries=3).remote(job))


def _select(job: StageContext) -> StageResult:
    """One pass over three files in the same order, a row group in memory at a time."""
    result = StageResult()
    kept = Kept()
    with UsageMeter() as meter, job.output(result) as directory:
        seed = pq.ParquetFile(job.input("seed") / files.ROWS)
        answers = Answers(job.input("generate"))
        fits = fitting(job, job.slice["row_tokens"])
        total = seed.metadata.num_rows
        with pq.ParquetWriter(directory / files.DISTILLED, SELECTED_SCHEMA) as writer:
            for batch in seed.iter_batches():
                rows = [chosen(row, answers.of(row["example_id"]), fits) for row in batch.to_pylist()]
                for row in rows:
                    kept.add(row)
                writer.write_table(pa.Table.from_pylist(rows, schema=SELECTED_SCHEMA))
                job.progress(kept.num_rows, total, "rows")
        answers.check_end()
        if job.step.must_keep:
            kept.check_any()
            kept.check_share(job.resources.generate.min_kept)
        result.summary = {
            "num_rows": total,
            "reasons": dict(kept.reasons.most_common()),
            "kept_distilled": kept.num_kept,
        }
    result.usage = meter.usage()
    return result


class Answers:
    """The samples of each row, asked for in the order of the seed set; `columns` beside what selection reads."""

    def __init__(self, directory: Path, columns: Sequence[str] = ()) -> None:
        self._streams = [_Ahead(_rows(directory / name, columns)) for name in (files.GENERATED, files.FAILED)]

    def of(self, example_id: str) -> list[dict[str, Any]]:
        samples = [row for stream in self._streams for row in stream.take(example_id)]
        assert samples, f"no answer to row {example_id}"
        return samples

    def check_end(self) -> None:
        assert all(stream.ahead is None for stream in self._streams), "answers to rows that nobody asked"


class _Ahead:
    """Rows of a stream with one row of look-ahead."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self.ahead = next(rows, None)

    def take(self, example_id: str) -> Iterator[dict[str, Any]]:
        while self.ahead is not None and self.ahead["example_id"] == example_id:
            yield self.ahead
            self.ahead = next(self._rows, None)


def _rows(path: Path, more: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = ["example_id", "response", "finish_reason", *more]  # never the signals: they are large
    for batch in pq.ParquetFile(path).iter_batches(columns=columns):
        yield from batch.to_pylist()


def fitting(job: StageContext, room: int) -> Fits:
    """Whether a row's prompt and a response fit a packed row of `room` tokens. Short ones are not tokenized."""
    from sdft_ray.data.documents import fits_surely

    chat = job.teacher.chat

    def fits(row: Mapping[str, str], response: str) -> bool:
        return fits_surely(chat, row, (response,), room) or len(chat.encode(row_prompt(row), response).ids) <= room

    return fits
