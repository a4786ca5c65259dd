"""A folder in place of the hub: everything that a recipe names there is read from it, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_ray.cli.options import load_recipe
from sdft_ray.data.rows import read_source
from sdft_ray.errors import RecipeError
from sdft_ray.pipeline.local_data import from_folder
from sdft_ray.recipe.inputs import Calibration, SeedSet
from sdft_ray.recipe.recipe import Recipe
from tests.support.recipes import make_recipe

ROOT = Path(__file__).resolve().parents[3]
SMOLLM2 = ROOT / "jobs/recipes/smollm2_135m.yaml"


def put(path: Path, text: str = "{}") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path.resolve())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path / "SmolLM2-135M-Instruct" / "config.json")
    put(tmp_path / "databricks" / "databricks-dolly-15k" / "train.jsonl")
    put(tmp_path / "gsm8k" / "train.jsonl.gz")
    return tmp_path


def test_every_name_of_the_hub_is_replaced(folder: Path) -> None:
    recipe = from_folder(Recipe.load(SMOLLM2), folder)
    assert recipe.teacher.model == str(folder / "SmolLM2-135M-Instruct")
    dolly = str(folder / "databricks" / "databricks-dolly-15k" / "train.jsonl")
    assert (recipe.seed_set.source, recipe.calibration.source) == (dolly, dolly)
    assert recipe.forgetting is not None
    assert recipe.forgetting.source == str(folder / "gsm8k" / "train.jsonl.gz")
    assert recipe.evaluate.data == str(folder)
    revisions = [recipe.teacher.revision, recipe.seed_set.revision, recipe.calibration.revision]
    assert (revisions, recipe.teacher.config) == ([None] * 3, None)
    assert "revision" not in recipe.to_yaml()


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_DATA", str(folder))
    assert load_recipe(SMOLLM2) == from_folder(Recipe.load(SMOLLM2), folder)
    monkeypatch.delenv("SDFT_DATA")
    assert load_recipe(SMOLLM2) == Recipe.load(SMOLLM2)


def test_paths_of_a_recipe_stay(folder: Path) -> None:
    recipe = make_recipe(folder, folder / "SmolLM2-135M-Instruct")
    changed = from_folder(recipe, folder)
    assert (changed.teacher, changed.seed_set) == (recipe.teacher, recipe.seed_set)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("SmolLM2-135M-Instruct/config.json", "does not hold the teacher HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gsm8k/train.jsonl.gz", r"does not hold gsm8k \(openai/gsm8k\) .*gsm8k/train.jsonl"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(RecipeError, match=message):
        from_folder(Recipe.load(SMOLLM2), folder)


def test_no_folder_and_a_split_in_parts(folder: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist → check --data or SDFT_DATA"):
        from_folder(Recipe.load(SMOLLM2), folder / "nowhere")
    (folder / "gsm8k" / "train.jsonl.gz").unlink()
    for part in (0, 1):
        put(folder / "gsm8k" / f"train-0000{part}-of-00002.parquet")
    with pytest.raises(RecipeError, match="in 2 files"):
        from_folder(Recipe.load(SMOLLM2), folder)


def test_a_sample_is_drawn_from_the_whole_source_and_keeps_its_order(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "instruction": f"q{i}", "reference": "a"} for i in range(200)]
    path = put(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def ids(part: SeedSet | Calibration) -> list[str]:
        tables = read_source(part, lambda kind, check: "")
        return [name for table in tables for name in table["example_id"].to_pylist()]

    small, large = (ids(SeedSet(source=path, sample=number)) for number in (20, 50))
    assert (len(small), len(large)) == (20, 50)
    assert set(small) < set(large)
    assert small == sorted(small, key=lambda name: int(name[1:]))
    assert any(int(name[1:]) > 100 for name in small)  # not the first rows
    assert ids(SeedSet(source=path, sample=500)) == [row["id"] for row in rows]
    assert set(ids(Calibration(source=path, limit=30, sample=10))) < {f"r{i}" for i in range(30)}
