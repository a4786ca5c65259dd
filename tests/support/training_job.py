"""A training step on its own: tiny inputs in a fresh store; as a script, it runs on a local Ray of its own.

python -m tests.support.training_job FOLDER RESOURCES_JSON TRAIN_JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import train
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.jobs import make_job
from tests.support.recipes import recipe_data
from tests.support.staged import output_of
from tests.support.tiny import make_model

NUM_ROWS = 40
ADDRESS = "train/" + "7" * 16
TRAIN = {
    "num_steps": 40,
    "global_batch_size": 6,
    "max_seq_len": 128,
    "schedule": "constant",
    "arms": {"sft": {"data": "reference", "learning_rate": 1e-3}},
}


def light(**changes: Any) -> Resources:
    part = {"cpus": 0.5, "num_workers": 2, "precision": "fp32", "checkpoint_every": 10, **changes}
    return Resources.model_validate({"cpus": 3, "object_store_bytes": 100 * 2**20, "train": part})


def training_job(folder: Path, resources: Resources, *, hidden: int = 32, **changes: Any) -> StageContext:
    """The arm `sft` of a recipe over rows `row-0`, `row-1`, ... and a random model of three blocks."""
    store = Store(str(folder / "store"))
    model, data = "prune/" + "1" * 16, "seed/" + "2" * 16
    if store.manifest(data) is None:
        make_model(folder / "teacher", "llama", num_blocks=3, hidden=hidden)
        _commit(store, model, folder / "teacher")
        (folder / "rows").mkdir()
        rows = [_row(number) for number in range(NUM_ROWS)]
        pq.write_table(pa.Table.from_pylist(rows, schema=SEED_SCHEMA), folder / "rows" / files.ROWS)
        _commit(store, data, folder / "rows")
    recipe = recipe_data(folder, folder / "teacher", train={**TRAIN, **changes})
    return make_job(
        step="train:sft",
        address=ADDRESS,
        store_url=store.url,
        recipe=Recipe.parse(recipe),
        resources=resources,
        teacher=ModelSource(directory=str(folder / "teacher")),
        inputs={"pruned": model, "data": data},
    )


def _row(number: int) -> dict[str, str]:
    told = " ".join(f"{number * step}" for step in range(number % 7 + 1))
    text = {"instruction": f"count by {number}", "reference_response": f"it is {told}"}
    return {"example_id": f"row-{number}", **text, "context": "", "answer_kind": "none", "check": "", "family": ""}


def _commit(store: Store, address: str, directory: Path) -> None:
    placed = store.place(address, directory)
    store.commit(Manifest(address.split("/")[0], "", address, "0" * 64, "{}", {}, placed, Usage()))


def history(job: StageContext) -> list[dict[str, Any]]:
    """Step records of a run that ended well."""
    text = (output_of(job) / files.HISTORY).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def weights(job: StageContext) -> bytes:
    """The student's tensors as they lie on disk."""
    return (output_of(job) / "model.safetensors").read_bytes()


def main(folder: str, resources: str, changes: str) -> None:
    from sdft_ray.stages.session import ray_session

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked = light(**json.loads(resources))
    with ray_session(asked):
        made = train.run(training_job(Path(folder), asked, **json.loads(changes)))
    print(json.dumps(made.summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
