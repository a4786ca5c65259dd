"""A small complete recipe over files in a folder, for tests that need one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_ray.recipe.recipe import Recipe


def write_rows(path: Path, num_rows: int = 6, *, offset: int = 0) -> Path:
    """Seed rows whose reference ends in a checkable number."""
    lines = [
        {
            "id": f"r{i + offset}",
            "instruction": f"what is {i} plus {i}",
            "reference": f"it is #### {2 * i}",
            "answer_kind": "number",
        }
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe_data(folder: Path, teacher: Path, **changes: Any) -> dict[str, Any]:
    """Plain data of a recipe; `changes` replace top-level parts."""
    seed = folder / "seed.jsonl"
    calibration = folder / "calibration.jsonl"
    if not seed.exists():
        write_rows(seed)
        write_rows(calibration, offset=100)
    data: dict[str, Any] = {
        "name": "tiny",
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "seed_set": {"source": str(seed)},
        "calibration": {"source": str(calibration)},
        "depth": {"remove_blocks": 1},
        "generate": {"max_tokens": 16},
        "train": {
            "num_steps": 2,
            "global_batch_size": 2,
            "max_seq_len": 128,
            "arms": {
                "sft": {"data": "reference", "learning_rate": 1e-3},
                "sdft": {"data": "distilled", "learning_rate": 1e-3},
            },
        },
        "evaluate": {"tasks": ({"name": "tiny_task"},)},
    }
    return {**data, **changes}


def make_recipe(folder: Path, teacher: Path, **changes: Any) -> Recipe:
    return Recipe.parse(recipe_data(folder, teacher, **changes))
