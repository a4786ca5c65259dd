"""A stage gets its slice of the recipe and no more: what is not in its identity cannot be read."""

from __future__ import annotations

import ast
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import sdft_ray.stages
from sdft_ray.recipe.inputs import Forgetting, SeedSet
from sdft_ray.recipe.recipe import Gap, Generate, Recipe
from sdft_ray.recipe.scoring import Evaluate, Speed
from sdft_ray.recipe.yaml_model import canonical
from sdft_ray.stages.evaluate import eval_config
from sdft_ray.stages.graph import Step, steps
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.names import StepName
from sdft_ray.stages.sources import Sources
from sdft_ray.stages.views import pruning_view, train_view, trial_view, view
from sdft_ray.store.store import Store
from tests.support.jobs import silent
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model
from tests.support.worlds import RESOURCES, write_tasks

KD = {"data": "distilled", "learning_rate": [1e-3, 5e-4], "objective": {"forward_kl": 1.0, "teacher_logits": "cached"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """One with most of what a recipe can hold, and no value at its default."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher", "llama", num_blocks=4)
    write_tasks(folder)
    (folder / "texts.jsonl").write_text('{"reference": "a text"}\n', encoding="utf-8")
    step_arm = {"data": "reference", "learning_rate": 0.1, "objective": {"reverse_kl": 0.5}}
    data = recipe_data(folder, folder / "teacher")
    data |= {
        "replicate": 3,
        "depth": {"metric": "perplexity", "drop": "one", "remove_blocks": "target"},
        "width": {"mlp": "target", "multiple_of": 2},
        "target": {"speedup": 1.5},
        "patch": {"ridge": 0.5},
        "steps": [{"depth": {"remove_blocks": 1}, "arm": step_arm, "num_steps": 4}],
        "generate": {"max_tokens": 16, "temperature": 0.5, "hidden_states": True},
        "gap": {"num_rows": 7},
        "forgetting": {"source": str(folder / "texts.jsonl"), "num_rows": 5, "max_tokens": 9, "embedding": "org/name"},
        "teacher_correction": {"data": "distilled", "learning_rate": 0.2, "num_steps": 6},
        "merges": {"both": {"arms": ["sft", "sdft"], "t": [0.25, 0.75], "kind": "linear"}},
        "speed": {"batch_rows": [2, 8], "prompt_tokens": 4, "new_tokens": 5, "rounds": 2},
        "seed_set": {**data["seed_set"], "limit": 5, "decontaminate": {"ngram": 8}},
        "evaluate": {
            "tasks": [{"name": "tiny_task", "num_fewshot": 1}],
            "include": str(folder / "tasks"),
            "tuned": ["tiny_task"],
            "limit": 4,
            "samples": {"num": 3},
        },
    }
    arms = {**data["train"]["arms"], "kd": KD}
    changed = {
        "validation_fraction": 0.3,
        "long_examples": "truncate_prompt",
        "max_grad_norm": 0.5,
        "lora": {"rank": 2},
    }
    data["train"] = {**data["train"], **changed, "arms": arms}
    return Recipe.parse(data)


def _step(recipe: Recipe, name: str) -> Step:
    return next(step for step in steps(recipe) if step.name == name)


def _shown(part: Any, *absent: str) -> dict[str, Any]:
    return canonical(part, exclude=set(absent))


def _only(step: Step, *names: str) -> dict[str, Any]:
    return {name: value for name, value in step.slice.items() if name in names}


def test_views_say_what_the_recipe_says(recipe: Recipe) -> None:
    for name, part in recipe.prunings.items():
        for arm in part.train.arms:
            for trial_name, trial in part.train.trials_of(arm).items():
                step = _step(recipe, f"train:{trial_name}")
                train = train_view(step)
                assert trial_view(step) == trial
                assert train.trials == {trial_name: trial}
                assert _shown(train, "arms") == _shown(part.train, "arms")
        label = str(StepName("plan", name))
        assert _shown(pruning_view(_step(recipe, label)), "patch", "distil_from") == {
            field: value for field in ("depth", "width", "target") if (value := _shown(part).get(field)) is not None
        }
    assert pruning_view(_step(recipe, "rate")).target == recipe.target
    assert pruning_view(_step(recipe, "measure")).depth == recipe.depth
    assert view(Generate, _step(recipe, "generate").slice) == recipe.generate
    assert view(Speed, _step(recipe, "speed").slice) == recipe.speed
    assert view(Speed, _step(recipe, "rate").slice["speed"]).largest_batch == recipe.speed.largest_batch
    assert view(Gap, _step(recipe, "gap").slice) == recipe.gap
    assert view(Gap, _step(recipe, "forget:teacher").slice["gap"]) == recipe.gap
    correction = recipe.correction
    assert correction is not None
    assert train_view(_step(recipe, "correct:teacher")) == correction


def test_what_is_not_in_the_slice_cannot_be_read(recipe: Recipe) -> None:
    evaluate = view(Evaluate, _step(recipe, "evaluate:teacher").slice, absent=("tuned", "include"))
    assert evaluate.limit == 4
    for name in ("tuned", "include"):
        with pytest.raises(AttributeError, match=name):
            getattr(evaluate, name)
    pruning = pruning_view(_step(recipe, "plan"))
    with pytest.raises(AttributeError, match="patch"):
        _ = pruning.patch
    asked = _only(_step(recipe, "forget:teacher"), "max_tokens")
    texts = view(Forgetting, asked, given={"source": ""}, absent=("source", "num_rows"))
    assert texts.max_tokens == 9
    with pytest.raises(AttributeError, match="num_rows"):
        _ = texts.num_rows


def test_an_entry_that_the_view_does_not_know_is_an_error(recipe: Recipe) -> None:
    """Such as the tasks in the slice of `seed`: whoever makes a view says what else is there."""
    with pytest.raises(ValidationError, match="tasks"):
        view(SeedSet, _step(recipe, "seed").slice, given={"source": ""})


def _job(recipe: Recipe, step: Step, folder: Path) -> StageContext:
    store = Store(str(folder / "store"))
    sources = Sources(recipe, store)
    return StageContext(
        step, "a/1", store.url, recipe.name, RESOURCES, sources.teacher, {}, silent, sources.places(step)
    )


def test_no_recipe_travels_to_a_worker(recipe: Recipe, tmp_path: Path) -> None:
    """What a pickled job holds are plain values, resources, and where sources lie: no part of a recipe."""
    offline = recipe.model_copy(
        update={"forgetting": recipe.forgetting and recipe.forgetting.model_copy(update={"embedding": None})}
    )
    for step in steps(offline):
        data = pickle.dumps(_job(offline, step, tmp_path), protocol=0)
        named = {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
        parts = {name for name in named if name.startswith("sdft_ray.recipe") and "resources" not in name}
        assert not parts, step.name
        assert pickle.loads(data).slice == step.slice


def test_places_are_those_of_the_step_alone(recipe: Recipe, tmp_path: Path) -> None:
    offline = recipe.model_copy(update={"forgetting": None})
    for step in steps(offline):
        places = _job(offline, step, tmp_path).places
        assert (places.rows is not None) == bool({"seed_set", "calibration", "forgetting"} & set(step.sources))
        assert (places.tasks.include is not None) == ("tasks" in step.sources)
        assert (places.embedding is not None) == ("embedding" in step.sources)


def test_stages_do_not_import_the_recipe() -> None:
    """Parts of it, to view a slice as; the whole only where slices are cut and sources are found."""
    for path in sorted(Path(sdft_ray.stages.__file__).parent.glob("*.py")):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert "Recipe" not in names or path.name in {"graph.py", "sources.py"}, path.name


def test_the_questions_of_an_evaluation_are_those_of_its_slice(recipe: Recipe, tmp_path: Path) -> None:
    asked = eval_config(_job(recipe, _step(recipe, "evaluate:teacher"), tmp_path))
    assert asked.tasks == ["tiny_task"]
    assert asked.limit == 4
    assert asked.include is not None
    assert Path(asked.include).name == "tasks"
    assert asked.samples is not None
    assert asked.samples.num == 3


def test_names_of_steps_are_parsed_as_they_are_made(recipe: Recipe) -> None:
    for step in steps(recipe):
        assert StepName.parse(step.name) == (step.stage, step.subject, step.trial)
    assert StepName.parse("train:kd@0.001#0") == ("train", "kd", "0.001#0")
    assert str(StepName("train", "kd", "0.001#0")) == "train:kd@0.001#0"
    assert _step(recipe, "train:kd@0.001").label == "kd@0.001"
    assert _step(recipe, "report").label == ""
