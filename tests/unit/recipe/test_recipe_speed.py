"""Batch sizes in a recipe: one or several, what counts as the same, and what a target in speed goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.scoring import Speed
from sdft_ray.stages.graph import steps
from tests.support.recipes import recipe_data


def recipe(folder: Path, *, target: Any = None, **speed: Any) -> Recipe:
    data = {**recipe_data(folder, folder), "speed": speed}
    if target is not None:
        data |= {"depth": {"remove_blocks": "target"}, "target": target}
    return Recipe.parse(data)


def slices(asked: Recipe) -> dict[str, dict[str, Any]]:
    return {step.name: step.slice for step in steps(asked)}


def test_one_client_and_a_batch_by_default() -> None:
    assert Speed().batches == (1, 16)
    assert Speed().largest_batch == 16


def test_lists_come_from_yaml_and_go_back(tmp_path: Path) -> None:
    asked = recipe(tmp_path, batch_rows=[32, 1, 8])
    assert asked.speed.batches == (1, 8, 32)
    path = tmp_path / "r.yaml"
    path.write_text(asked.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == asked


@pytest.mark.parametrize(("one", "same"), [([4], 4), ([16, 1], [1, 16])])
def test_however_it_is_written(tmp_path: Path, one: Any, same: Any) -> None:
    assert recipe(tmp_path, batch_rows=one) == recipe(tmp_path, batch_rows=same)


def test_a_default_that_is_written_out_is_the_default(tmp_path: Path) -> None:
    assert slices(recipe(tmp_path, batch_rows=[16, 1]))["speed"] == {} == slices(recipe(tmp_path))["speed"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "speed.batch_rows: Input should be greater than or equal to 1"),
        ([4, 0], "speed.batch_rows: Input should be greater than or equal to 1"),
        ([4, 4], "speed.batch_rows: give one number, or a list of different ones"),
        ([], "speed.batch_rows: give one number, or a list of different ones"),
        (2.5, "speed.batch_rows: Input should be a valid integer"),
        (True, "speed.batch_rows: Input should be a valid integer"),
        ("many", "speed.batch_rows: Input should be a valid integer"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, batch_rows=value)
    assert caught.value.message == f"recipe: {says}"


def test_a_target_in_speed_goes_by_the_largest_batch_alone(tmp_path: Path) -> None:
    """The addresses of before there were several sizes stay: 16 was the default then, and is the largest now."""

    def rated(**speed: Any) -> dict[str, Any]:
        return slices(recipe(tmp_path, target={"speedup": 1.5}, **speed))["rate"]["speed"]

    assert rated() == rated(batch_rows=16) == rated(batch_rows=[4, 16]) == {}
    assert rated(batch_rows=2) == rated(batch_rows=[1, 2]) == {"batch_rows": 2}
    assert rated(batch_rows=[1, 2], rounds=3) == {"batch_rows": 2, "rounds": 3}
