"""Stages `seed`, `calibration` and `texts`: rows from outside become a table with ids, inside the store.

Seed rows that share words with a test question are left out here, before anything is generated. Other tasks give
another seed set, and yet no row is generated twice: the row cache of `generate` knows rows by their content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.decontamination import OverlapIndex, contaminated_rows
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.data.reading import Reading
from sdft_ray.data.rows import read_source, read_spread
from sdft_ray.errors import DataError
from sdft_ray.generation.checks import check_error
from sdft_ray.recipe.inputs import Calibration, Forgetting, SeedSet
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.spec import STAGES
from sdft_ray.stages.views import view
from sdft_ray.store import files

ROW_GROUP = 4096
"""Rows per row group: what a generation actor reads at a time."""
NUM_EXAMPLES = 5
"""Rows left out whose ids the manifest holds."""


def _tables(job: StageContext, reading: Reading) -> Iterator[pa.Table]:
    """The rows that the step is to store, in tables of `SEED_SCHEMA`."""
    assert job.places.rows is not None, "the step names its source"
    source, revision = job.places.rows
    given = {"source": source, "revision": revision}
    if job.step.stage == "texts":
        texts = view(Forgetting, job.slice, given=given, absent=("max_tokens", "embedding", "embedding_revision"))
        return read_spread(texts, check_error, reading=reading)
    if job.step.stage == "calibration":
        asked = view(Calibration, job.slice, given=given, absent=("max_tokens",))
        return read_source(asked, check_error, reading=reading)
    seed = view(SeedSet, _own(job.slice), given=given)
    return read_source(seed, check_error, turns=job.slice.get("turns", "last"), reading=reading)


def _own(seed: dict[str, Any]) -> dict[str, Any]:
    """Without what the slice of a seed set has from other parts of the recipe."""
    return {name: value for name, value in seed.items() if name not in ("tasks", "turns")}


def _ngram(job: StageContext) -> int:
    """Words in a row that no seed row may share with a test question; 0 in a step of another stage, or without that."""
    if job.step.stage != "seed":
        return 0
    return view(SeedSet, _own(job.slice), given={"source": ""}, absent=("source",)).decontaminate.ngram


def run(job: StageContext) -> StageResult:
    """Light: it runs in the driver, unless lm-eval is needed for its questions, which goes to a worker."""
    if _ngram(job):
        return ray.get(ray.remote(make).options(num_cpus=STAGES["seed"].extra_cpus, max_retries=3).remote(job))
    return make(job)


def make(job: StageContext) -> StageResult:
    """Read, check and store the rows, one table in memory at a time.

    Raises `DataError`, and `EvaluationError` for tasks that cannot be had.
    """
    result = StageResult()
    families: Counter[str] = Counter()
    reading = Reading()
    with UsageMeter() as meter, job.output(result) as directory:
        job.phase("reading the questions of the tasks" if _ngram(job) else "reading the rows")
        sieve = _Sieve(job) if job.step.stage == "seed" else None
        with pq.ParquetWriter(directory / files.ROWS, SEED_SCHEMA, write_statistics=False) as writer:
            for table in _tables(job, reading):
                kept = sieve.keep(table) if sieve else table
                if kept.num_rows:
                    writer.write_table(kept, row_group_size=ROW_GROUP)
                families.update(kept["family"].to_pylist())
                job.progress(families.total(), 0, "rows")
        if sieve:
            result.summary["decontamination"] = sieve.summary()
        result.summary["reading"] = reading.summary()
        result.summary |= {"num_rows": families.total(), "families": dict(sorted(families.items()))}
    result.usage = meter.usage()
    return result


class _Sieve:
    """Lets rows through that share no words with a test question, and counts the others."""

    def __init__(self, job: StageContext) -> None:
        self._ngram = _ngram(job)
        self._index = OverlapIndex(_questions(job), self._ngram) if self._ngram else None
        self._num_rows = self._num_contaminated = 0
        self._examples: list[str] = []

    def keep(self, rows: pa.Table) -> pa.Table:
        """Rows of `SEED_SCHEMA`, order kept."""
        self._num_rows += rows.num_rows
        if self._index is None:
            return rows
        contaminated = contaminated_rows(self._index, rows)
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


def _questions(job: StageContext) -> Iterable[Sequence[str]]:
    from sdft_ray.evaluation.tasks import task_questions

    return task_questions(job.slice["tasks"], job.places.tasks)
