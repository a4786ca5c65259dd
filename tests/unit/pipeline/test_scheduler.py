"""Which waiting engines go before a step starts, as far as it can be seen without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from sdft_ray.pipeline.scheduler import GraphRun, Scheduler
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import evaluators, session
from sdft_ray.stages.evaluators import WorkerPool
from sdft_ray.stages.graph import State, steps
from sdft_ray.stages.session import Capacity
from sdft_ray.store.store import Store
from tests.support.recipes import recipe_data


@pytest.mark.parametrize(("step", "num_left"), [("train:sft", 0), ("measure", 1), ("evaluate:teacher", 1)])
def test_training_has_the_memory_of_waiting_engines_even_where_there_are_cpus_enough(
    step: str, num_left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # nobody is killed: the crew is let go
    monkeypatch.setattr(session, "num_nodes", lambda: 1)
    resources = Resources()
    kind = resources.evaluate.model_dump_json()
    monkeypatch.setattr(evaluators, "_idle", {kind: [WorkerPool(object(), [object()])]})
    recipe = Recipe.parse(recipe_data(tmp_path, tmp_path / "teacher"))
    known = steps(recipe)
    walk = GraphRun(recipe, Store(str(tmp_path / "store")), resources, "r", known)
    capacity = Capacity(cpus=64.0, gpus=0.0)
    scheduler = Scheduler([walk], resources, capacity, None, lambda event: None, tmp_path / "log")
    scheduler._make_room((walk, next(State(each, "missing") for each in known if each.name == step)))
    assert len(evaluators._idle[kind]) == num_left
