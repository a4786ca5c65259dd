"""The exported laboratory: complete, the same every time, and without leaks between its sets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft_ray.lab import sets
from sdft_ray.lab.export import HELDOUT_PREFIX, TASK_PREFIX, export
from sdft_ray.lab.families import ANNOTATORS, FAMILIES, Item
from sdft_ray.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("lab"))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _files(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_two_exports_are_equal_and_a_second_one_writes_nothing(laboratory: Path, tmp_path: Path) -> None:
    assert _files(export(tmp_path)) == _files(laboratory)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    export(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_export_mends_a_changed_file(tmp_path: Path) -> None:
    export(tmp_path)
    victim = tmp_path / "calibration.jsonl"
    good = victim.read_bytes()
    victim.write_text("spoilt")
    export(tmp_path)
    assert victim.read_bytes() == good


def test_sizes_columns_and_ids(laboratory: Path) -> None:
    sizes = {"seed/word_problems": 2000, "seed/mixed": 1001, "calibration": 128, "heldout": 700}
    for name, count in sizes.items():
        rows = _rows(laboratory / f"{name}.jsonl")
        for column in ("id", "instruction"):
            assert len(rows) == len({row[column] for row in rows}) == count
        assert all(set(row) == {"id", "instruction", "reference", "answer_kind", "family"} for row in rows)
    mixed = _rows(laboratory / "seed/mixed.jsonl")
    assert {row["family"] for row in mixed} == set(FAMILIES)
    assert {row["answer_kind"] for row in mixed} == {"number", "text", "list"}


def test_no_question_is_in_two_sets() -> None:
    every = [[item.question for item in items] for items in sets.training_sets().values()]
    every.append(sorted(sets.reserved_questions()))
    flat = [question for questions in every for question in questions]
    assert len(flat) == len(set(flat))
    assert len(sets.reserved_questions()) == sets.NUM_TEST * len(FAMILIES)


def _pairs() -> list[tuple[Item, dict[str, str]]]:
    return list(zip(sets.training_sets()["mixed"], sets.seed_rows("mixed"), strict=True))


def test_both_annotators_write_references() -> None:
    first = [row["reference"] == item.references[0] for item, row in _pairs() if row["instruction"] == item.question]
    assert len(ANNOTATORS) == 2
    assert 0.4 < sum(first) / len(first) < 0.6


def test_each_third_row_with_options_asks_for_the_answer_alone() -> None:
    """And in every family, so that fine-tuning on none of them unlearns the form of the tests."""
    asked = [(item, row) for item, row in _pairs() if row["instruction"] != item.question]
    assert all(row["instruction"] == item.exam and row["reference"] == item.answer for item, row in asked)
    found = Counter(item.family for item, _ in asked)
    every = Counter(item.family for item, _ in _pairs() if item.options)
    assert set(found) == set(every)
    for family, count in every.items():
        assert found[family] == pytest.approx(count / sets.EXAM_EVERY, abs=count / 20)


@pytest.mark.parametrize(("prefix", "counts"), [(TASK_PREFIX, [sets.NUM_TEST]), (HELDOUT_PREFIX, range(75, 121))])
def test_task_files_point_at_their_data(laboratory: Path, prefix: str, counts: Collection[int]) -> None:
    heldout = {item.question for item in sets.training_sets()["heldout"]}
    for family in FAMILIES:
        task = yaml.safe_load((laboratory / "tasks" / f"{prefix}{family}.yaml").read_text())
        rows = _rows(laboratory / "tasks" / task["dataset_kwargs"]["data_files"]["test"])
        assert task["task"] == prefix + family
        assert len(rows) in counts
        asked = {row["question"].removesuffix(" Give only the answer.") for row in rows}
        assert asked <= (sets.reserved_questions() if prefix == TASK_PREFIX else heldout)
        if task["output_type"] == "multiple_choice":
            assert all(0 <= row["gold"] < len(row["choices"]) for row in rows)
        else:
            assert all(row["answer"] for row in rows)


def test_the_quickstart_recipe_loads_and_names_the_tasks(laboratory: Path) -> None:
    recipe = Recipe.load(laboratory / "quickstart.yaml")
    assert {task.name for task in recipe.evaluate.tasks} == {TASK_PREFIX + family for family in FAMILIES}
    assert set(recipe.train.arms) == {"sft", "sdft"}
    assert Path(recipe.teacher.model).is_dir()
    assert Path(recipe.seed_set.source).is_file()


def test_the_grid_differs_from_the_quickstart_in_its_arms_and_tasks_alone(laboratory: Path) -> None:
    """Otherwise a rate would be chosen for another training than the one that it is used in."""
    quick, grid = (Recipe.load(laboratory / f"{name}.yaml") for name in ("quickstart", "grid"))
    bare = {"name": "", "description": "", "gates": None, "train": None, "evaluate": None}
    assert quick.model_copy(update=bare) == grid.model_copy(update=bare)
    assert quick.train.model_copy(update={"arms": {}}) == grid.train.model_copy(update={"arms": {}})
    assert {task.name for task in grid.evaluate.tasks} == {HELDOUT_PREFIX + family for family in FAMILIES}
    rates: dict[str, set[float]] = {}
    for arm in grid.train.arms.values():
        assert isinstance(arm.learning_rate, float)
        rates.setdefault(arm.data, set()).add(arm.learning_rate)
    assert rates["reference"] == rates["distilled"]
    assert all(arm.learning_rate in rates[arm.data] for arm in quick.train.arms.values())


@pytest.mark.slow
def test_export_needs_no_torch(tmp_path: Path) -> None:
    code = (
        f"import sys; from sdft_ray.lab.export import export; export({str(tmp_path)!r}); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
