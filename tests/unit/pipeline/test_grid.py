"""Arms with several trials and a teacher that is corrected: what a recipe may say, and what moves which address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import DataError, DivergenceError, RecipeError
from sdft_ray.pipeline.explain import explain
from sdft_ray.pipeline.preflight import check_rows
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.graph import State, check_inputs, input_addresses, resolve, steps
from sdft_ray.stages.names import StepName
from sdft_ray.stages.sources import Sources
from sdft_ray.store.fingerprint import canonical_json
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model

KD = {"data": "reference", "learning_rate": 1e-3, "objective": {"forward_kl": 1.0}}
CORRECTION = {"data": "reference", "learning_rate": 1e-4, "num_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher")
    return folder


def recipe(world: Path, arms: dict[str, Any], *, correction: Any = None, **train: Any) -> Recipe:
    data = recipe_data(world, world / "teacher", teacher_correction=correction)
    return Recipe.parse({**data, "train": {**data["train"], "arms": arms, **train}})


def arm(**changes: Any) -> dict[str, Any]:
    return {"data": "reference", "learning_rate": 1e-3, **changes}


def commit(store: Store, state: State, **summary: Any) -> None:
    identity = canonical_json(state.identity)
    store.commit(
        Manifest(
            state.step.name, state.step.stage, state.address, state.fingerprint, identity, {}, {}, Usage(), summary
        )
    )


def resolved(asked: Recipe, store: Store) -> dict[str, State]:
    return resolve(asked, store, Sources(asked, store))


def walked(asked: Recipe, store: Store, losses: dict[str, float | None]) -> dict[str, State]:
    """States after everything is committed, with summaries made up; `losses` maps trials to theirs."""
    store.check_writable()
    while True:
        states = resolved(asked, store)
        state = next((state for state in states.values() if state.status == "missing"), None)
        if state is None:
            return states
        summary: dict[str, Any] = {}
        if state.step.stage == "plan":
            summary = {"plan": {"keep_blocks": [0, 1, 2]}}
        if state.step.stage == "train" and (loss := losses.get(state.step.label, 1.0)) is not None:
            summary = {"held_out_loss": loss}
        elif state.step.stage == "train":
            summary = {"diverged": "training diverged at step 1"}
        if state.step.stage == "choose":
            found = {role: losses.get(StepName.parse(name).label) for role, name in state.step.inputs.items()}
            summary = {"chosen": min(found, key=lambda role: (found[role] is None, found[role]))}
        commit(store, state, **summary)


# -- what a recipe may say -------------------------------------------------------------------------------------


def test_a_grid_has_a_trial_per_rate_and_seed_in_ascending_order(world: Path) -> None:
    asked = recipe(world, {"sft": arm(learning_rate=(1e-3, 5e-5), seed=(2, 1)), "one": arm()}, validation_fraction=0.2)
    trials = {name: (trial.learning_rate, trial.seed) for name, trial in asked.train.trials.items()}
    assert trials == {
        "sft@5e-05#1": (5e-5, 1), "sft@5e-05#2": (5e-5, 2), "sft@0.001#1": (1e-3, 1), "sft@0.001#2": (1e-3, 2),
        "one": (1e-3, 0),
    }  # fmt: skip
    rates = recipe(world, {"sft": arm(learning_rate=(1e-3, 5e-5))}, validation_fraction=0.2)
    assert list(rates.train.trials) == ["sft@5e-05", "sft@0.001"]


def test_lists_come_from_yaml_and_go_back(world: Path, tmp_path: Path) -> None:
    asked = recipe(
        world,
        {"sft": arm(learning_rate=(1e-3, 2e-3), seed=(0, 1)), "kd": KD},
        validation_fraction=0.1,
        correction=CORRECTION,
    )
    path = tmp_path / "r.yaml"
    path.write_text(asked.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == asked
    assert json.loads(json.dumps(asked.model_dump(mode="json")))["train"]["arms"]["sft"]["seed"] == [0, 1]


def test_a_list_of_one_is_that_one(world: Path) -> None:
    assert recipe(world, {"a": arm(learning_rate=(1e-3,), seed=(3,))}) == recipe(world, {"a": arm(seed=3)})


HELD_OUT = {"validation_fraction": 0.1}


@pytest.mark.parametrize(
    ("arms", "train", "says"),
    [
        ({"a": arm(learning_rate=(1e-3, 2e-3))}, {}, "arm 'a' has several trials, .*: set train.validation_fraction"),
        ({"a": arm(seed=(0, 1))}, {}, "set train.validation_fraction"),
        (
            {"a": arm(learning_rate=(1e-3, 1e-3))},
            {"validation_fraction": 0.1},
            "learning_rate: give one number, or a list of dif",
        ),
        ({"a": arm(seed=())}, HELD_OUT, "arms.a.seed: give one number"),
        ({"a": arm(learning_rate=0.0)}, {}, "arms.a.learning_rate: Input should be greater than 0"),
        (
            {"a": arm(learning_rate=(1e-3, -1.0))},
            {"validation_fraction": 0.1},
            "arms.a.learning_rate: Input should be greater",
        ),
        ({"a": arm(learning_rate="fast")}, {}, "arms.a.learning_rate: Input should be a valid number"),
        ({"a": arm(seed=0.5)}, {}, "arms.a.seed: Input should be a valid integer"),
        (
            {"a": arm()},
            {"validation_fraction": 0.6},
            "train.validation_fraction: Input should be less than or equal to 0.5",
        ),
        ({"a": arm()}, {"correction": CORRECTION}, "teacher_correction has no effect: no arm compares with a teacher"),
        ({"a": KD}, {"correction": {**CORRECTION, "num_epochs": 1.0}}, "exactly one of num_steps, num_epochs"),
        ({"a": KD}, {"correction": {"learning_rate": 1e-4, "num_steps": 1}}, "'teacher_correction.data' is missing"),
    ],
)
def test_mistakes_are_named(world: Path, arms: dict[str, Any], train: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(world, arms, **train)


def test_a_part_without_rows_shows_before_anything_starts(world: Path) -> None:
    """None of the six rows of the seed set falls below so small a fraction."""
    assert check_rows(recipe(world, {"a": arm()}, validation_fraction=0.5)) == 6
    with pytest.raises(DataError, match="holds out 0 of 6 rows"):
        check_rows(recipe(world, {"a": arm()}, validation_fraction=1e-9))


# -- what moves which address ----------------------------------------------------------------------------------


def test_a_student_chosen_from_a_grid_is_the_one_of_its_rate_alone(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    arms = {"sft": arm(learning_rate=(1e-3, 2e-3, 4e-3)), "other": arm(data="distilled")}
    merges = {"both": {"arms": ("sft", "other")}}
    grid = recipe(world, arms, validation_fraction=0.3).model_copy(update={"merges": {}})
    grid = Recipe.parse({**grid.model_dump(mode="python"), "merges": merges})
    states = walked(grid, store, {"sft@0.001": 0.5, "sft@0.002": 0.4, "sft@0.004": None})
    alone = recipe(world, {**arms, "sft": arm(learning_rate=2e-3)}, validation_fraction=0.3)
    alone = Recipe.parse({**alone.model_dump(mode="python"), "merges": merges})
    single = resolved(alone, store)
    assert single["train:sft"].address == states["train:sft@0.002"].address
    for name in ("train:sft", "evaluate:sft", "merge:both", "evaluate:both", "train:other", "evaluate:other"):
        assert single[name].status == "done", name
    assert "choose:sft" not in single
    chosen = states["train:sft@0.002"].address
    assert input_addresses(states["evaluate:sft"].step, states)["model"] == chosen
    assert input_addresses(states["merge:both"].step, states)["first"] == chosen
    assert input_addresses(states["report"].step, states)["choose:sft"] == states["choose:sft"].address
    explained = {line.step: line.why for line in explain(grid, store).lines}
    assert explained["train:sft@0.001"].endswith("held-out loss 0.500")
    assert explained["train:sft@0.004"].endswith("diverged")
    assert explained["choose:sft"].endswith("chose train:sft@0.002")


def test_downstream_waits_for_the_choice(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.check_writable()
    asked = recipe(world, {"sft": arm(learning_rate=(1e-3, 2e-3))}, validation_fraction=0.3)
    commit(store, resolved(asked, store)["plan"], plan={"keep_blocks": [0]})
    lines = {line.step: line for line in explain(asked, store).lines}
    assert {name: line.status for name, line in lines.items() if "sft" in name} == {
        "train:sft@0.001": "missing", "train:sft@0.002": "missing", "choose:sft": "missing", "evaluate:sft": "waits",
    }  # fmt: skip
    assert lines["evaluate:sft"].why == "waits until a trial of sft is chosen"


def test_a_deleted_trial_is_made_again_but_no_choice_is_changed(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    asked = recipe(world, {"sft": arm(learning_rate=(1e-3, 2e-3))}, validation_fraction=0.3)
    states = walked(asked, store, {"sft@0.001": 0.5, "sft@0.002": 0.4})
    (tmp_path / states["train:sft@0.002"].address / "manifest.json").unlink()
    again = resolved(asked, store)
    assert {name for name, state in again.items() if state.status != "done"} == {"train:sft@0.002"}
    assert again["evaluate:sft"].address == states["evaluate:sft"].address


def test_arms_with_one_trial_have_the_steps_that_they_always_had(world: Path) -> None:
    asked = recipe(world, {"a": arm(learning_rate=(1e-3, 2e-3)), "b": arm(seed=4)}, validation_fraction=0.1)
    by_name = {step.name: step for step in steps(asked)}
    assert by_name["train:b"].slice["arm"] == {"data": "reference", "learning_rate": 1e-3, "seed": 4}
    assert by_name["train:a@0.002"].slice["arm"] == {"data": "reference", "learning_rate": 2e-3}
    plain = {step.name: step for step in steps(recipe(world, {"b": arm(seed=4)}))}
    assert "held_out" not in plain["train:b"].slice
    assert not [name for name in plain if name.startswith(("choose", "correct", "gap:corrected"))]


def test_a_trial_that_diverged_has_no_model_for_a_recipe_of_its_own(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    grid = recipe(world, {"sft": arm(learning_rate=(1e-3, 9.0))}, validation_fraction=0.3)
    walked(grid, store, {"sft@0.001": 0.5, "sft@9.0": None})
    states = resolved(recipe(world, {"a": arm(learning_rate=9.0)}, validation_fraction=0.3), store)
    assert states["train:a"].status == "done"
    with pytest.raises(DivergenceError, match=r"train:a: training diverged at step 1.*lower the learning rate"):
        check_inputs(states["evaluate:a"].step, states)
    check_inputs(states["report"].step, states)


# -- the teacher's correction ----------------------------------------------------------------------------------


def test_only_arms_with_a_teacher_take_the_corrected_one(world: Path, tmp_path: Path) -> None:
    arms = {"sft": arm(), "kd": KD}
    stores = [Store(str(tmp_path / name)) for name in ("plain", "corrected", "slower")]
    slower = {**CORRECTION, "learning_rate": 1e-5}
    plain, corrected, other = (
        walked(recipe(world, arms, correction=correction), store, {})
        for store, correction in zip(stores, (None, CORRECTION, slower), strict=True)
    )
    moved = {name for name, state in plain.items() if state.fingerprint != corrected[name].fingerprint}
    assert moved == {"train:kd", "evaluate:kd", "report"}
    assert corrected["train:kd"].fingerprint != other["train:kd"].fingerprint
    assert set(corrected) - set(plain) == {"correct:teacher", "gap:corrected"}
    inputs = input_addresses(corrected["train:kd"].step, corrected)
    assert inputs["online_teacher"] == corrected["correct:teacher"].address
    assert inputs["pruned"] == corrected["prune"].address


def test_a_correction_is_a_training_of_its_own_length(world: Path) -> None:
    asked = recipe(
        world,
        {"kd": KD},
        correction={**CORRECTION, "lora": {"rank": 2}},
        train_last_n_layers=1,
        validation_fraction=0.2,
    )
    step = next(step for step in steps(asked) if step.name == "correct:teacher")
    assert step.inputs == {"data": "seed"}
    assert step.slice == {
        "held_out": 0.2, "lora": {"rank": 2}, "num_steps": 2, "row_tokens": 128, "rows_per_step": 2,
        "arm": {"data": "reference", "learning_rate": 1e-4},
    }  # fmt: skip
    measured = next(step for step in steps(asked) if step.name == "gap:corrected")
    assert measured.slice == {"held_out": 0.2}
