"""What a release of `finished_run` holds, for tests of pushing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import yaml

from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.scoring import Release
from sdft_ray.release.push import CARD, RECIPE, RECORD
from tests.support.finished_run import CORRECT


def bounded(run: Run, min_recovery: float) -> Run:
    """The same run, its recipe with a bound on recovery: sdft has 12/17 of its teacher, sft 8/17."""
    recipe = run.recipe.model_copy(update={"release": Release(min_recovery=min_recovery)})
    return replace(run, record={**run.record, "recipe": recipe.to_yaml()})


def model_files(run: Run, student: str = "sdft") -> dict[str, bytes]:
    directory = run.student_path(student)
    inner = {"manifest.json", "history.jsonl"}
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in inner}


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_release(there: dict[str, bytes], run: Run, student: str = "sdft") -> None:
    """The model's files as they are, and three texts that agree with them."""
    model = model_files(run, student)
    assert there.keys() == model.keys() | {CARD, RECIPE, RECORD}
    assert {name: there[name] for name in model} == model
    record = json.loads(there[RECORD])
    listed = {name: entry["sha256"] for name, entry in record["files"].items()}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in there.items() if name != RECORD}
    assert record["scores"][student]["tiny_task"]["value"] == CORRECT[student]["tiny_task"].count("1") / 10
    assert record["addresses"][f"train:{student}"] == run.manifests[f"train:{student}"].address
    assert Recipe.parse(yaml.safe_load(there[RECIPE])).train == run.recipe.train
    assert run.store.url not in b"".join(there[name] for name in (CARD, RECIPE, RECORD)).decode()
