"""A sample of the seed set, before any step has run: the same rows that `generate` answers first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sdft_ray.errors import DataError
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.graph import State
from sdft_ray.store import files
from sdft_ray.store.store import Store


def drawn_rows(recipe: Recipe, store: Store, seed: State, num_rows: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of the seed set in the order of the draw, and how many it has; those that a run has made, where there are.

    Raises `DataError` where there are none.
    """
    from sdft_ray.generation.chunks import Ledger, keys_of
    from sdft_ray.stages.rewriter import KEY_COLUMNS

    def tables() -> Iterator[pa.Table]:
        return _seed_tables(recipe, store, seed)

    ledger = Ledger(keys_of(tables(), KEY_COLUMNS))
    if not ledger.num_rows:
        raise DataError(
            f"the seed set {recipe.seed_set.source} has no rows", "give rows with an instruction and a reference"
        )
    drawn = ledger.draw(num_rows, recipe.generate.seed).tolist()
    wanted, found, start = set(drawn), {}, 0
    for table in tables():
        here = [position - start for position in sorted(wanted) if start <= position < start + table.num_rows]
        rows = table.take(pa.array(here, pa.int64())).to_pylist()
        found |= {start + place: row for place, row in zip(here, rows, strict=True)}
        start += table.num_rows
    return [found[position] for position in drawn], ledger.num_rows


def _seed_tables(recipe: Recipe, store: Store, seed: State) -> Iterator[pa.Table]:
    import pyarrow.parquet as pq

    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.checks import check_error

    if seed.status == "done":
        with pq.ParquetFile(store.path(seed.address) / files.ROWS) as table:
            yield from (pa.Table.from_batches([batch]) for batch in table.iter_batches())
    else:
        yield from read_source(recipe.seed_set, check_error, turns=recipe.train.turns)
