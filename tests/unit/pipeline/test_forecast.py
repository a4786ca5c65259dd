"""From what probes found to the time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft_ray.generation.pace import Pace
from sdft_ray.models.size import ModelSize
from sdft_ray.pipeline.forecast import Forecast, Measured, Texts, train_key, wall_seconds
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, Step, steps
from sdft_ray.stages.probes import TaskTime, Timed, TrainTimes
from tests.support.recipes import make_recipe, recipe_data

TEACHER = ModelSize(4, 1000, 2000, 10, 4000)
PRUNED = ModelSize(3, 750, 1500, 8, 3000)
TEXTS = Texts(
    num_rows=1000, reference_tokens=60.0, selected_tokens=80.0, prompt_tokens=100.0, response_tokens=50.0, kept=0.5
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    train = {**recipe_data(tmp_path, tmp_path)["train"], "num_steps": None, "num_epochs": 2.0, "max_seq_len": 100}
    return make_recipe(tmp_path, tmp_path, train={name: value for name, value in train.items() if value is not None})


def step(recipe: Recipe, name: str) -> Step:
    return next(step for step in steps(recipe) if step.name == name)


def forecast(recipe: Recipe, found: Measured, **resources: dict[str, object]) -> Forecast:
    return Forecast(recipe, Resources.model_validate(resources), TEACHER, {"": PRUNED}, found, TEXTS, 1)


def test_a_stage_takes_its_start_and_its_units(recipe: Recipe) -> None:
    found = Measured(1.0, 0.5, measure=Timed(3.0, 2.0, 10), nll=Timed(4.0, 0.001), speed=Timed(1.0, 5.0))
    told = forecast(recipe, found, measure={"num_tasks": 4})
    assert told.seconds(step(recipe, "measure")) == 3.0 + 3 * 2.0
    # Teacher and pruned model score 512 rows at most, of those kept.
    assert told.seconds(step(recipe, "gap")) == pytest.approx(4.0 + 64 * (60 + 80) * 0.001)
    assert told.seconds(step(recipe, "speed")) == pytest.approx(1.0 + 6 * 1.75 * 5.0)


def test_generation_is_as_fast_as_its_engine_is_busy(recipe: Recipe) -> None:
    found = Measured(1.0, 0.5, generate_start_s=7.0, pace=Pace(0.001, 0.002, 0.4))
    told = forecast(recipe, found, generate={"max_sequences": 100})
    assert told.seconds(step(recipe, "generate")) == pytest.approx(7 + 100 + 100 + 0.4 * 500)


def test_training_takes_its_steps(recipe: Recipe) -> None:
    sdft = step(recipe, "train:sdft")
    found = Measured(1.0, 0.5, train={train_key(sdft): TrainTimes(10.0, 4.0, 1.0)})
    told = forecast(recipe, found, train={"num_workers": 1, "micro_batch_size": 1})
    # 1,000 rows of 80 tokens fill 843 rows of 100; two epochs of two rows a step; a step has two micro-batches.
    assert told.seconds(sdft) == pytest.approx(5 + 10 + 843 * (2 * 4 + 1), rel=1e-3)
    fewer = told.seconds(step(recipe, "train:sft"))
    assert fewer == pytest.approx(5 + 10 + 632 * 9, rel=1e-3)


def test_evaluations_scale_with_the_model(recipe: Recipe) -> None:
    found = Measured(
        1.0,
        0.5,
        engine_start_s=20.0,
        engine_change_s=8.0,
        tasks=(TaskTime("a", 1.0, 0.5, 100), TaskTime("b", 2.0, 1.0, 10)),
    )
    told = forecast(recipe, found)
    assert told.seconds(step(recipe, "evaluate:teacher")) == 20 + 3 + 60
    assert told.seconds(step(recipe, "evaluate:sft")) == pytest.approx(8 + 3 + 0.75 * 60)


def test_what_no_probe_told_has_no_time(recipe: Recipe) -> None:
    told = forecast(recipe, Measured(1.0, 0.5))
    assert told.seconds(step(recipe, "train:sft")) is None
    assert told.seconds(step(recipe, "gap")) is None
    assert told.seconds(Step("rate", {})) is None


def states(*given: tuple[str, str, tuple[str, ...]]) -> list[State]:
    return [
        State(Step(stage, {}, {name: name for name in inputs}, subject=subject), "missing")
        for stage, subject, inputs in given
    ]


def test_steps_run_side_by_side_as_far_as_the_machine_allows() -> None:
    resources = Resources.model_validate({"measure": {"cpus": 1.0}, "gap": {"cpus": 1.0}})
    two = states(("measure", "a", ()), ("gap", "b", ()))
    seconds = {"measure:a": 10.0, "gap:b": 7.0}
    assert wall_seconds(two, seconds, resources, 2.0, 0.0) == 10.0
    assert wall_seconds(two, seconds, resources, 1.0, 0.0) == 17.0
    after = states(("measure", "a", ()), ("gap", "b", ("measure:a",)))
    assert wall_seconds(after, seconds, resources, 2.0, 0.0) == 17.0


def test_speed_is_measured_alone_and_what_is_done_takes_no_time() -> None:
    resources = Resources()
    alone = states(("measure", "a", ()), ("speed", "", ()))
    assert wall_seconds(alone, {"measure:a": 10.0, "speed": 5.0}, resources, 8.0, 0.0) == 15.0
    done = [State(alone[0].step, "done"), alone[1]]
    assert wall_seconds(done, {"measure:a": 10.0, "speed": 5.0}, resources, 8.0, 0.0) == 5.0
