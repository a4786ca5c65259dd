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


def test_a_variant_of_a_study_takes_the_suite_of_its_recipe_back(tmp_path: Path) -> None:
    tasks = [{"name": "gsm8k"}]
    assert recipe(tmp_path, {"suite": None, "tasks": tasks}) == recipe(tmp_path, {"tasks": tasks})


def test_what_is_given_beside_a_suite_stands(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"suite": "quick", "limit": 7, "apply_chat_template": True, "tuned": ("gsm8k",)}).evaluate
    assert (asked.limit, asked.apply_chat_template, asked.tuned) == (7, True, ("gsm8k",))


def test_the_laboratory_suite_is_what_the_quickstart_asks(tmp_path: Path) -> None:
    asked = recipe(tmp_path, {"suite": "lab", "include": "tasks"}).evaluate
    assert asked.tasks == Recipe.load(QUICKSTART).evaluate.tasks


def test_the_small_suite_is_likelihoods_of_options_and_the_generative_one_is_written(tmp_path: Path) -> None:
    small = recipe(tmp_path, {"suite": "small"}).evaluate
    assert [task.name for task in small.tasks] == ["arc_easy", "piqa", "hellaswag", "winogrande", "openbookqa", "boolq"]
    assert (small.limit, small.apply_chat_template) == (500, False)
    written = recipe(tmp_path, {"suite": "generative"}).evaluate
    assert [task.name for task in written.tasks] == ["gsm8k", "ifeval"]
    assert written.apply_chat_template


def test_several_suites_and_further_tasks_are_one_list(tmp_path: Path) -> None:
    asked = {"suite": ("small", "generative"), "tasks": ({"name": "truthfulqa_mc2"},), "apply_chat_template": True}
    names = [task.name for task in recipe(tmp_path, asked).evaluate.tasks]
    assert names == [task["name"] for name in ("small", "generative") for task in SUITES[name]["tasks"]] + [
        "truthfulqa_mc2"
    ]


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"suite": "open-llm-leaderboard"}, "did you mean open-llm-leaderboard-v1"),
        ({"suite": "x"}, "no suite 'x'; known: open-llm-leaderboard-v1, quick, small, generative, lab"),
        ({"suite": "quick", "tasks": ({"name": "gsm8k"},)}, "a task is listed twice"),
        ({"suite": ("small", "generative")}, "differ in apply_chat_template .*give apply_chat_template beside them"),
        ({"suite": "quick", "tuned": ("hellaswag",)}, "tuned lists 'hellaswag'"),
    ],
)
def test_what_is_refused(tmp_path: Path, evaluate: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, evaluate)
