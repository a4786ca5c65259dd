"""Stages `seed` and `calibration`: rows from outside become a table with ids, inside the store.

Seed rows that share words with a test question are left out here, before anything is generated. Other tasks give
another seed set, and yet no row is generated twice: the row cache of `generate` knows rows by their content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.decontamination import OverlapIndex
from sdft_ray.data.sources import read_rows
from sdft_ray.errors import DataError
from sdft_ray.generation.checks import check_error
from sdft_ray.recipe import Calibration, Recipe, RowSource
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, Progress

ROW_GROUP = 1024
"""Rows per row group: what a generation actor reads at a time."""
NUM_EXAMPLES = 5
"""Rows left out whose ids the manifest holds."""


def read(source: RowSource) -> pa.Table:
    """The rows of a recipe's part, as `SEED_SCHEMA`. Only a calibration set may hold plain text."""
    return read_rows(
        source.source,
        columns=source.columns,
        answer_kind=source.answer_kind,
        check=source.check,
        check_error=check_error,
        limit=source.limit,
        plain_text=isinstance(source, Calibration),
        revision=source.revision,
    )


def run(job: Job) -> Made:
    """Light: it runs in the driver, unless lm-eval is needed for its questions, which goes to a worker."""
    if job.step == "seed" and job.recipe.seed_set.decontaminate.ngram:
        return ray.get(ray.remote(make).options(num_cpus=0.2, max_retries=3).remote(job))
    return make(job)


def make(job: Job) -> Made:
    """Read, check and store the rows. Raises `DataError`, and `EvaluationError` for tasks that cannot be had."""
    made = Made()
    is_seed = job.step == "seed"
    with Meter() as meter, job.output(made) as directory:
        table = read(job.recipe.seed_set if is_seed else job.recipe.calibration)
        if is_seed:
            ngram = job.recipe.seed_set.decontaminate.ngram
            questions = _questions(job.recipe) if ngram else ()
            table, made.summary["decontamination"] = decontaminate(table, questions, ngram, job.progress)
        pq.write_table(table, directory / files.ROWS, row_group_size=ROW_GROUP)
        families = Counter(table["family"].to_pylist())
        made.summary |= {"num_rows": table.num_rows, "families": dict(sorted(families.items()))}
    made.usage = meter.usage()
    return made


def _questions(recipe: Recipe) -> Iterable[Sequence[str]]:
    from sdft_ray.evaluation.tasks import task_questions

    include = recipe.evaluate.include
    return task_questions([task.name for task in recipe.evaluate.tasks], Path(include) if include else None)


def decontaminate(
    rows: pa.Table, questions: Iterable[Sequence[str]], ngram: int, progress: Progress
) -> tuple[pa.Table, dict[str, Any]]:
    """Rows of `SEED_SCHEMA` that share no `ngram` words in a row with a question (0: all rows), and the count.

    Order is kept. Raises `DataError` when no row is left.
    """
    counts: dict[str, Any] = {"ngram": ngram, "num_rows": rows.num_rows}
    if not ngram:
        return rows, counts
    index = OverlapIndex(questions, ngram)
    contaminated: list[bool] = []
    for batch in rows.to_batches(max_chunksize=ROW_GROUP):
        texts = (batch[name].to_pylist() for name in ("instruction", "reference_response"))
        contaminated += index.contaminated(*texts).tolist()
        progress(len(contaminated), rows.num_rows, "rows")
    dropped = rows.filter(pa.array(contaminated))
    kept = rows.filter(pa.array([not flag for flag in contaminated]))
    if not kept.num_rows:
        raise DataError(
            f"all {rows.num_rows:,} rows of the seed set share {ngram} words in a row with a test question",
            "take another seed set; where all texts share phrases by design, set seed_set.decontaminate.ngram to 0",
        )
    examples = dropped["example_id"].slice(0, NUM_EXAMPLES).to_pylist()
    counts |= {"num_questions": index.num_questions, "num_contaminated": dropped.num_rows, "examples": examples}
    return kept, counts
