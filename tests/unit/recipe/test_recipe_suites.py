"""Suites stand for their tasks: a recipe that names one is the recipe that writes it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import RecipeError
from sdft_ray.lab.export import QUICKSTART
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.suites import SUITES
from sdft_ray.recipe.yaml_model import parse_yaml
from tests.support.recipes import recipe_data

LEADERBOARD = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "winogrande": (5, "acc"),
    "gsm8k": (5, "exact_match,strict-match"),
}


def recipe(folder: Path, evaluate: dict[str, Any]) -> Recipe:
    return Recipe.parse({**recipe_data(folder, folder), "evaluate": evaluate})


def test_the_leaderboard_is_as_it_was_defined(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"suite": "open-llm-leaderboard-v1"}).evaluate
    assert {task.name: (task.num_fewshot, task.metric) for task in asked.tasks} == LEADERBOARD
    assert asked.limit is None
    assert not asked.apply_chat_template


def test_a_suite_and_its_tasks_written_out_are_one_recipe(tmp_path: Path) -> None:
    named = recipe(tmp_path, {"suite": "quick", "seed": 3})
    written = recipe(tmp_path, {**SUITES["quick"], "seed": 3})
    assert named == written
    assert Recipe.parse(parse_yaml(named.to_yaml())) == named


def test_what_is_given_beside_a_suite_stands(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"suite": "quick", "limit": 7, "apply_chat_template": True, "tuned": ("gsm8k",)}).evaluate
    assert (asked.limit, asked.apply_chat_template, asked.tuned) == (7, True, ("gsm8k",))


def test_the_laboratory_suite_is_what_the_quickstart_asks(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"suite": "lab", "include": "tasks"}).evaluate
    assert asked.tasks == Recipe.load(QUICKSTART).evaluate.tasks


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"suite": "open-llm-leaderboard"}, "did you mean open-llm-leaderboard-v1"),
        ({"suite": "x"}, "no suite 'x'; known: open-llm-leaderboard-v1, quick, lab"),
        ({"suite": "quick", "tasks": ({"name": "gsm8k"},)}, "give suite quick or tasks, not both"),
        ({"suite": "quick", "tuned": ("hellaswag",)}, "tuned lists 'hellaswag'"),
    ],
)
def test_what_is_refused(tmp_path: Path, evaluate: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, evaluate)
