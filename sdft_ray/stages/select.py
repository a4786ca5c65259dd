"""Stage `select`: conditional selection. Keep a rewrite when its answer checks, else the reference, and say why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.example import SELECTED_SCHEMA
from sdft_ray.data.messages import row_prompt
from sdft_ray.errors import DataError
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.spec import STAGES
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.generation.selection import Selected


Fits = Callable[[Mapping[str, str], str], bool]


def run(job: StageContext) -> StageResult:
    """One light task: answer checks are text, and take microseconds a row."""
    return ray.get(ray.remote(_select).options(num_cpus=STAGES["select"].extra_cpus, max_retries=3).remote(job))


def _select(job: StageContext) -> StageResult:
    """One pass over three files in the same order, a row group in memory at a time."""
    result = StageResult()
    reasons: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    with UsageMeter() as meter, job.output(result) as directory:
        seed = pq.ParquetFile(job.input("seed") / files.ROWS)
        answers = Answers(job.input("generate"))
        fits = _fitting(job)
        total = seed.metadata.num_rows
        with pq.ParquetWriter(directory / files.DISTILLED, SELECTED_SCHEMA) as writer:
            for batch in seed.iter_batches():
                chosen = [_chosen(row, answers.of(row["example_id"]), fits) for row in batch.to_pylist()]
                reasons.update(row["reason"] for row in chosen)
                sources.update(row["source"] for row in chosen)
                writer.write_table(pa.Table.from_pylist(chosen, schema=SELECTED_SCHEMA))
                job.progress(reasons.total(), total, "rows")
        answers.check_end()
        if job.step.must_keep and not sources["distilled"]:
            raise _nothing_kept(reasons)
        result.summary = {
            "num_rows": total,
            "reasons": dict(reasons.most_common()),
            "kept_distilled": sources["distilled"],
        }
    result.usage = meter.usage()
    return result


_NEXT_STEPS = {
    "truncated": "raise generate.max_tokens; if answers run on past their end, the template's end of turn does not "
    "stop generation: see the tokenizer's eos_token and generation_config.json",
    "no_reference_answer": "correct seed_set.answer_kind: it finds no answer in the references",
    "too_long": "raise train.max_seq_len",
    "error": "the summary of generate has the errors",
    "leaked_reference": "use another generate.template",
}
"""Most frequent reason -> what to do where nothing was kept."""


def _nothing_kept(reasons: Counter[str]) -> DataError:
    """Arms of distilled data would train on references alone."""
    told = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    (most, _), *_ = reasons.most_common(1)
    return DataError(
        f"none of the {reasons.total():,} rewrites was kept ({told}), so there is no distilled set to train on",
        _NEXT_STEPS.get(most, "look at the answers in the artifact of generate, and check seed_set.answer_kind"),
    )


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


def _chosen(row: dict[str, Any], samples: list[dict[str, Any]], fits: Fits) -> dict[str, Any]:
    """The first sample that passes, else the reference with the reason of the last one."""
    from sdft_ray.generation.selection import select

    def verdict(sample: dict[str, Any]) -> Selected:
        return select(row, sample["response"], sample["finish_reason"], partial(fits, row))

    sample = samples[0]
    chosen = verdict(sample)
    for later in samples[1:]:
        if chosen.source == "distilled":
            break
        sample, chosen = later, verdict(later)
    return {
        **row,
        "distilled_response": sample["response"],
        "response": chosen.response,
        "source": chosen.source,
        "reason": chosen.reason,
    }


def _fitting(job: StageContext) -> Fits:
    """Whether a row's prompt and a response fit a packed row together. Short ones are not tokenized."""
    from sdft_ray.data.documents import fits_surely

    chat = job.teacher.chat
    room = job.slice["row_tokens"]

    def fits(row: Mapping[str, str], response: str) -> bool:
        return fits_surely(chat, row, (response,), room) or len(chat.encode(row_prompt(row), response).ids) <= room

    return fits
