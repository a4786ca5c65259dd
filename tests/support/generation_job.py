"""A generation job on its own: the stage's input in a fresh store, and nothing else of a recipe's run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.lab import sets
from sdft_ray.lab.export import QUICKSTART, TEACHER
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import steps
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.rows import ROW_GROUP
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store

QUESTION = "A farmer has {0} hens and sells {1} of them on market day. How many hens does the farmer keep? (case {2})"
ANSWER = "The farmer begins with {0} hens and {1} of them go, which leaves a few. So the farmer keeps some. #### {2}"


def make_job(
    store: Store, resources: Resources, rows: Iterable[pa.Table], teacher: Path = TEACHER, *, must_keep: bool = False
) -> StageContext:
    """The stage's job over a seed set that is committed here. Without `must_keep` rewrites may be bad."""
    seed = "seed/" + "5" * 16
    if store.manifest(seed) is None:
        work = store.work(seed) / "output"
        work.mkdir(parents=True)
        with pq.ParquetWriter(work / files.ROWS, SEED_SCHEMA, write_statistics=False) as writer:
            for batch in rows:
                writer.write_table(batch, row_group_size=ROW_GROUP)
        placed = store.place(seed, work)
        store.commit(Manifest("seed", "seed", seed, "5" * 64, "{}", {}, placed, Usage()))
    recipe = Recipe.load(QUICKSTART)
    return StageContext(
        step=replace(next(step for step in steps(recipe) if step.name == "generate"), must_keep=must_keep),
        address="generate/" + "6" * 16,
        store_url=store.url,
        recipe_name=recipe.name,
        resources=resources,
        teacher=TeacherModel(str(teacher), ModelSource(directory=str(teacher)), recipe.teacher.dtype),
        inputs={"seed": seed},
        progress=lambda done, total, unit: None,
        identity={"inputs": {"teacher": {"content": "shipped"}}},
    )


def farm_rows(num_rows: int) -> Iterator[pa.Table]:
    """Different rows of about the length of a laboratory word problem, in tables of `SEED_SCHEMA`."""
    for start in range(0, num_rows, 4 * ROW_GROUP):
        numbers = range(start, min(start + 4 * ROW_GROUP, num_rows))
        yield pa.table(
            {
                "example_id": [f"row-{n}" for n in numbers],
                "instruction": [QUESTION.format(n % 90 + 10, n % 10, n) for n in numbers],
                "context": [""] * len(numbers),
                "reference_response": [ANSWER.format(n % 90 + 10, n % 10, n % 90) for n in numbers],
                "answer_kind": ["number"] * len(numbers),
                "check": [""] * len(numbers),
                "family": [""] * len(numbers),
            },
            schema=SEED_SCHEMA,
        )


def laboratory_rows(num_rows: int) -> Iterator[pa.Table]:
    """The laboratory's word problems, `num_rows` of at most 2,000."""
    rows = sets.seed_rows("word_problems")[:num_rows]
    assert len(rows) == num_rows, "the set is smaller"
    names = {"id": "example_id", "reference": "reference_response"}
    renamed = [
        {"check": "", "context": "", **{names.get(key, key): value for key, value in row.items()}} for row in rows
    ]
    yield pa.Table.from_pylist(renamed, schema=SEED_SCHEMA)
