"""Stages `seed` and `calibration`: rows from outside become a table with ids, inside the store."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.data.sources import read_rows
from sdft_ray.generation.checks import check_error
from sdft_ray.recipe import Calibration, RowSource
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter

ROW_GROUP = 1024
"""Rows per row group: what a generation actor reads at a time."""


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
    """Read, check and store the rows. Light: it runs in the driver."""
    made = Made()
    with Meter() as meter, job.output(made) as directory:
        table = read(job.recipe.seed_set if job.step == "seed" else job.recipe.calibration)
        pq.write_table(table, directory / files.ROWS, row_group_size=ROW_GROUP)
        families = Counter(table["family"].to_pylist())
        made.summary = {"num_rows": table.num_rows, "families": dict(sorted(families.items()))}
    made.usage = meter.usage()
    return made
