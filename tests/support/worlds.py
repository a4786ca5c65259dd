"""A folder with everything that a complete run needs: tiny random teacher, rows, one lm-eval task, light resources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.yaml_model import dump_yaml
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model

TASK = """\
task: tiny_task
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
LIGHT = {
    "measure": {"cpus": 0.5, "num_tasks": 2, "batch_tokens": 64},
    "generate": {"sampler": "transformers", "cpus": 0.5, "min_kept": 0.0},
    "gap": {"cpus": 0.5, "batch_tokens": 64},
    "train": {"cpus": 0.5, "num_workers": 2, "precision": "fp32", "checkpoint_every": 1},
    "evaluate": {"cpus": 0.5, "sampler": "transformers"},
}
RESOURCES = Resources.model_validate(LIGHT)
ONE_WORKER = {**LIGHT, "train": {**LIGHT["train"], "num_workers": 1}}
"""For tests that say nothing about how training is distributed."""


def make_world(folder: Path) -> Path:
    """Write teacher and task files into `folder` and return it."""
    make_model(folder / "teacher", "llama", num_blocks=4)
    write_tasks(folder)
    return folder


def write_tasks(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny_task.yaml").write_text(TASK, encoding="utf-8")
    rows = [{"question": f"what is {i}", "choices": ["one", "two"], "answer": i % 2} for i in range(8)]
    (folder / "tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def world_data(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe's plain data."""
    data = recipe_data(folder, folder / "teacher")
    # A random teacher ends few answers, and none of them is right: some are kept where answers are not checked.
    data["seed_set"] = {**data["seed_set"], "columns": {"answer_kind": ""}}
    data["generate"] = {"max_tokens": 24, "temperature": 1.0, "seed": 23}
    data["evaluate"] = {**data["evaluate"], "include": str(folder / "tasks")}
    data["speed"] = {"batch_rows": 2, "prompt_tokens": 4, "new_tokens": 4, "rounds": 1}
    return {**data, **changes}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe as a file; `resources.yaml` beside it."""
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(json.loads(json.dumps(world_data(folder, **changes)))), encoding="utf-8")
    (folder / "resources.yaml").write_text(dump_yaml({"cpus": 3, **ONE_WORKER}), encoding="utf-8")
    return path
