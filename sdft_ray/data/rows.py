"""Rows of a recipe's part: all of them, or some spread evenly over the set."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from sdft_ray.data.conversations import Turns
from sdft_ray.data.reading import Reading
from sdft_ray.data.sources import CheckError, read_tables
from sdft_ray.data.subset import nested_subset, spread
from sdft_ray.recipe.inputs import Calibration, Forgetting, RowSource


def read_source(
    source: RowSource, check_error: CheckError, *, turns: Turns = "last", reading: Reading | None = None
) -> Iterator[pa.Table]:
    """Stream the rows of a part, in tables of `SEED_SCHEMA`; only sets that measure may hold plain text.

    With `source.sample` all rows are in memory at once. Raises `DataError` as `read_tables`, which says what the other
    arguments are.
    """
    tables = read_tables(
        source.source,
        columns=source.columns,
        answer_kind=source.answer_kind,
        check=source.check,
        check_error=check_error,
        limit=source.limit,
        plain_text=isinstance(source, Calibration | Forgetting),
        turns=turns,
        revision=source.revision,
        reading=reading,
    )
    return tables if source.sample is None else _sampled(tables, source.sample)


def _sampled(tables: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    table = pa.concat_tables(tables)
    if table.num_rows > num_rows:
        ids = table["example_id"].to_pylist()
        chosen = nested_subset(ids, num_rows)
        table = table.filter(pa.array([name in chosen for name in ids]))
    yield table


def read_spread(source: Forgetting, check_error: CheckError, *, reading: Reading | None = None) -> Iterator[pa.Table]:
    """At most `source.num_rows` rows, spread evenly over all. The source is read twice, a table in memory at a time."""
    total = sum(table.num_rows for table in read_source(source, check_error))
    wanted, start = spread(total, source.num_rows), 0
    for table in read_source(source, check_error, reading=reading):
        here = [index - start for index in wanted if start <= index < start + table.num_rows]
        yield table.take(pa.array(here, pa.int64()))
        start += table.num_rows
