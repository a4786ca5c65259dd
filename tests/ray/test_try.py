"""A rehearsal on real Ray: every probe runs, nothing is committed, and a run reuses what was rewritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_ray.cli.render_try import rehearsal_text
from sdft_ray.generation.prompts import TEMPLATES
from sdft_ray.pipeline.rehearsal import Rehearsal, rehearse
from sdft_ray.pipeline.step import run_step
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.store.store import Store
from tests.support.worlds import ONE_WORKER, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

RESOURCES = Resources.model_validate(ONE_WORKER)


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    return Recipe.parse(
        world_data(
            world, evaluate={"tasks": ({"name": "tiny_task"}, {"name": "tiny_words"}), "include": str(world / "tasks")}
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("rehearsed")))


@pytest.fixture(scope="module")
def found(recipe: Recipe, store: Store) -> Rehearsal:
    return rehearse(recipe, store, RESOURCES, num_rows=4, view="none")


def test_every_step_of_the_run_has_a_time(found: Rehearsal) -> None:
    times = {step.step: step.seconds for step in found.steps}
    assert {"seed", "measure", "generate", "gap", "train:sft", "train:sdft", "evaluate:sdft", "speed"} <= set(times)
    assert all(seconds is not None and seconds >= 0 for seconds in times.values()), found.steps
    assert found.total_s >= max(seconds for seconds in times.values() if seconds is not None)


def test_all_templates_were_tried_on_the_same_rows(found: Rehearsal) -> None:
    assert {trial.name for trial in found.templates} == set(TEMPLATES)
    assert all(sum(trial.reasons.values()) == trial.num_rows == 4 for trial in found.templates)
    data = json.loads(rehearsal_text(found))
    assert data["num_seed_rows"] == 6
    assert data["recommendation"]["template"] in TEMPLATES


def test_nothing_is_committed_and_a_run_reuses_the_rewrites(found: Rehearsal, recipe: Recipe, store: Store) -> None:
    assert store.manifests() == []
    made = run_step(recipe, "generate", store, RESOURCES, view="none")["generate"].manifest
    assert made is not None
    assert made.summary["rows_reused"] == 4
