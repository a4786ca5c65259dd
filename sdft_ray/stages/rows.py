"""Stages `seed`, `calibration` and `texts`: rows from outside become a table with ids, inside the store.

Seed rows that share words with a test question are left out here, before anything is generated. Other tasks give
another seed set, and yet no row is generated twice: the row cache of `generate` knows rows by their content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.decontamination import OverlapIndex
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.data.sources import read_tables
from sdft_ray.errors import DataError
from sdft_ray.evaluation.shift import spread
from sdft_ray.generation.checks import check_error
from sdft_ray.recipe.recipe import Calibration, Forgetting, Recipe, RowSource
from sdft_ray.stages.job import Job, Made, Meter
from sdft_ray.store import files

ROW_GROUP = 4096
"""Rows per row group: what a generation actor reads at a time."""
NUM_EXAMPLES = 5
"""Rows left out whose ids the manifest holds."""


def read(source: RowSource) -> Iterator[pa.Table]:
    """Stream the rows of a recipe's part, as `SEED_SCHEMA`. Only sets that measure may hold plain text."""
    return read_tables(
        source.source,
        columns=source.columns,
        answer_kind=source.answer_kind,
        check=source.check,
        check_error=check_error,
        limit=source.limit,
        plain_text=isinstance(source, Calibration | Forgetting),
        revision=source.revision,
    )


def read_spread(source: Forgetting) -> Iterator[pa.Table]:
    """At most `num_rows` of its rows, spread evenly over all of them. The source is read twice, and never held."""
    total = sum(table.num_rows for table in read(source))
    wanted, start = spread(total, source.num_rows), 0
    for table in read(source):
        here = [index - start for index in wanted if start <= index < start + table.num_rows]
        yield table.take(pa.array(here, pa.int64()))
        start += table.num_rows


def _tables(job: Job) -> Iterator[pa.Table]:
    if job.step == "texts":
        assert job.recipe.forgetting is not None
        return read_spread(job.recipe.forgetting)
    return read(job.recipe.seed_set if job.step == "seed" else job.recipe.calibration)


def run(job: Job) -> Made:
    """Light: it runs in the driver, unless lm-eval is needed for its questions, which goes to a worker."""
    if job.step == "seed" and job.recipe.seed_set.decontaminate.ngram:
        return ray.get(ray.remote(make).options(num_cpus=0.2, max_retries=3).remote(job))
    return make(job)


def make(job: Job) -> Made:
    """Read, check and store the rows, one table in memory at a time.

    Raises `DataError`, and `EvaluationError` for tasks that cannot be had.
    """
    made = Made()
    is_seed = job.step == "seed"
    families: Counter[str] = Counter()
    with Meter() as meter, job.output(made) as directory:
        sieve = _Sieve(job.recipe) if is_seed else None
        with pq.ParquetWriter(directory / files.ROWS, SEED_SCHEMA, write_statistics=False) as writer:
            for table in _tables(job):
                kept = sieve.keep(table) if sieve else table
                if kept.num_rows:
                    writer.write_table(kept, row_group_size=ROW_GROUP)
                families.update(kept["family"].to_pylist())
                job.progress(families.total(), 0, "rows")
        if sieve:
            made.summary["decontamination"] = sieve.summary()
        made.summary |= {"num_rows": families.total(), "families": dict(sorted(families.items()))}
    made.usage = meter.usage()
    return made


class _Sieve:
    """Lets rows through that share no words with a test question, and counts the others."""

    def __init__(self, recipe: Recipe) -> None:
        self._ngram = recipe.seed_set.decontaminate.ngram
        self._index = OverlapIndex(_questions(recipe), self._ngram) if self._ngram else None
        self._num_rows = self._num_contaminated = 0
        self._examples: list[str] = []

    def keep(self, rows: pa.Table) -> pa.Table:
        """Rows of `SEED_SCHEMA`, order kept."""
        self._num_rows += rows.num_rows
        if self._index is None:
            return rows
        texts = (rows[name].to_pylist() for name in ("instruction", "reference_response"))
        contaminated = self._index.contaminated(*texts)
        self._num_contaminated += int(contaminated.sum())
        room = NUM_EXAMPLES - len(self._examples)
        self._examples += rows.filter(pa.array(contaminated))["example_id"].slice(0, room).to_pylist()
        return rows.filter(pa.array(~contaminated))

    def summary(self) -> dict[str, Any]:
        """The count. Raises `DataError` when no row is left."""
        if self._index is None:
            return {"ngram": 0, "num_rows": self._num_rows}
        if self._num_contaminated == self._num_rows:
            raise DataError(
                f"all {self._num_rows:,} rows of the seed set share {self._ngram} words in a row with a test question",
                "take another seed set; where all texts share phrases by design, set seed_set.decontaminate.ngram to 0",
            )
        return {
            "ngram": self._ngram,
            "num_rows": self._num_rows,
            "num_questions": self._index.num_questions,
            "num_contaminated": self._num_contaminated,
            "examples": self._examples,
        }


def _questions(recipe: Recipe) -> Iterable[Sequence[str]]:
    from sdft_ray.evaluation.tasks import task_questions

    include = recipe.evaluate.include
    return task_questions([task.name for task in recipe.evaluate.tasks], Path(include) if include else None)
