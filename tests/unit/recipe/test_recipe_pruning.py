"""Recipes that prune in several ways or in steps: what may stand together, and what each pruning is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.pruning import Patch, Target, Width
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import parse_yaml
from tests.support.recipes import make_recipe, recipe_data

CACHED = {"forward_kl": 1.0, "teacher_logits": "cached"}
ARM = {"data": "reference", "learning_rate": 1.0}


def pruned(folder: Path, **parts: object) -> dict:
    """Plain data of a recipe with other parts; None leaves one out."""
    return {name: part for name, part in recipe_data(folder, folder, **parts).items() if part is not None}


def step(**parts: object) -> dict:
    """An earlier step; None leaves a part out."""
    usual = {"depth": {"remove_blocks": 1}, "arm": ARM, "num_steps": 1}
    return {name: part for name, part in {**usual, **parts}.items() if part is not None}


def matching(**others: object) -> dict:
    """An arm that compares hidden states with a teacher's."""
    return {**ARM, "objective": {"hidden_mse": 1.0}, **others}


def arms(**named: dict) -> dict:
    return {"num_steps": 1, "arms": named}


OPEN = {"remove_blocks": "target"}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"target": {"parameters": 0.5}}, "target has no effect: write `remove_blocks: target`"),
        ({"width": {"mlp": 0.5}, "target": {"parameters": 0.5}}, "target has no effect"),
        ({"steps": (step(target={"parameters": 0.5}),)}, "steps.0: target has no effect"),
        ({"depth": OPEN}, "depth or width says `target`, but it is missing"),
        ({"width": {"hidden": "target"}}, "depth or width says `target`, but it is missing"),
        ({"depth": None, "width": {"mlp": 0.5, "heads": "target"}}, "depth or width says `target`"),
        (
            {"steps": (step(), step(depth=OPEN)), "depth": OPEN, "target": {"parameters": 0.5}},
            "steps.1: depth or width says",
        ),
        ({"depth": OPEN, "target": {}}, "target: give exactly one of parameters, memory_bytes, speedup, tokens_per_s"),
        ({"depth": OPEN, "target": {"parameters": 0.5, "memory_bytes": 9}}, "target: give exactly one of parameters"),
        ({"depth": OPEN, "target": {"speedup": 2.0, "tokens_per_s": 9.0}}, "target: give exactly one of parameters"),
        (
            {"depth": OPEN, "target": {"parameters": 0.5, "context_tokens": 4096}},
            "target: context_tokens and batch_rows are only for memory_bytes",
        ),
        (
            {"depth": OPEN, "target": {"speedup": 2.0, "batch_rows": 2}},
            "target: context_tokens and batch_rows are only for memory_bytes",
        ),
        ({"depth": OPEN, "target": {"parameters": 1.0}}, "target.parameters"),
        ({"depth": OPEN, "target": {"memory_bytes": 0}}, "target.memory_bytes"),
        ({"depth": OPEN, "target": {"speedup": 1.0}}, "target.speedup"),
        ({"depth": {"remove_blocks": "open"}}, "depth.remove_blocks"),
        ({"depth": {"keep_parameters": "target"}}, "depth.keep_parameters"),
        ({"depth": {**OPEN, "keep_parameters": 0.5}, "target": {"parameters": 0.5}}, "depth: give exactly one of"),
        ({"depth": None, "width": {"mlp": 0.5}, "patch": {}}, "patch replaces removed blocks"),
        ({"steps": (step(depth=None, width={"mlp": 0.5}, patch={}),)}, "steps.0: patch replaces removed blocks"),
        (
            {"patch": {}, "depth": {"metric": "first", "remove_blocks": 1}},
            "patch needs a kept block before a removed one",
        ),
        (
            {"patch": {}, "depth": {"metric": "explicit", "blocks": (1, 0)}},
            "patch needs a kept block before a removed one",
        ),
        ({"patch": {"ridge": 0.0}}, "patch.ridge"),
        ({"depth": None}, "nothing to prune: set depth, width, or both"),
        ({"steps": (step(depth=None),)}, "steps.0: nothing to prune: set depth, width, or both"),
    ],
)
def test_prunings_that_contradict_themselves(tmp_path: Path, parts: dict, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(pruned(tmp_path, **parts))
    assert f"recipe: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"distil_from": "previous"}, "distil_from: previous needs `steps`"),
        ({"steps": (step(num_steps=None),)}, "steps.0: give exactly one of num_steps, num_epochs"),
        ({"steps": (step(), step(num_epochs=1.0))}, "steps.1: give exactly one of num_steps, num_epochs"),
        ({"steps": (step(arm=None),)}, "'steps.0.arm' is missing"),
        (
            {"steps": (step(arm={**ARM, "learning_rate": (1e-3, 1e-4)}),)},
            "steps.0: the arm of an earlier step takes one learning rate and one seed, not a list",
        ),
        (
            {"steps": (step(arm={**ARM, "seed": (0, 1)}),)},
            "steps.0: the arm of an earlier step takes one learning rate and one seed, not a list",
        ),
        ({"steps": (step(),), "train": arms(step1=ARM)}, "'step1' is the name of another model of this recipe"),
        ({"steps": (step(), step()), "train": arms(a=ARM, step2=ARM)}, "'step2' is the name of another model"),
        (
            {"steps": (step(),), "merges": {"step1": {"arms": ("sft", "sdft")}}},
            "'step1' is the name of another model",
        ),
        ({"patch": {}, "train": arms(patched=ARM)}, "'patched' is the name of another model of this recipe"),
        (
            {"steps": (step(arm={**ARM, "data": "distilled", "objective": {"top_k_kl": 1.0}}),)},
            "steps.0.arm: top_k_kl needs generate.top_logprobs, which is off",
        ),
        (
            {
                "steps": (
                    step(),
                    step(
                        arm={**ARM, "data": "distilled", "objective": {"forward_kl": 1.0, "teacher_logits": "cached"}}
                    ),
                ),
                "generate": {"top_logprobs": 4},
            },
            "steps.1.arm: forward_kl needs generate.hidden_states, which is off",
        ),
        (
            {"steps": (step(),), "train": arms(match=matching())},
            "train.arms.match compares hidden states block by block, and the blocks of this student are those of "
            "the model before this step, not of the original: set distil_from: previous",
        ),
        ({"steps": (step(), step(arm=matching()))}, "steps.1.arm compares hidden states block by block"),
        (
            {"steps": (step(), step(arm=matching())), "distil_from": "previous", "train": arms(match=matching())},
            "steps.1.arm compares hidden states block by block",
        ),
        (
            {"steps": (step(width={"hidden": 0.5}, arm=matching()),)},
            "steps.0.arm compares hidden states, and with width.hidden",
        ),
        (
            {
                "depth": OPEN,
                "width": {"hidden": "target"},
                "target": {"parameters": 0.5},
                "train": arms(match=matching()),
            },
            "train.arms.match compares hidden states, and with width.hidden",
        ),
    ],
)
def test_steps_that_cannot_follow_each_other(tmp_path: Path, parts: dict, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(pruned(tmp_path, **parts))
    assert f"recipe: {says}" in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"train": arms(step1=ARM, patched=ARM)},  # names are free where nothing else bears them
        {"steps": (step(),), "train": arms(step2=ARM)},
        {"steps": (step(patch={}),), "train": arms(patched=ARM)},
        {"steps": (step(arm=matching()),)},  # the first step starts from the original
        {"steps": (step(),), "distil_from": "previous", "train": arms(match=matching())},
        {"steps": (step(), step(arm=matching(), distil_from="previous"))},
        {"steps": (step(width={"hidden": 0.5}),), "distil_from": "previous", "train": arms(match=matching())},
        {"depth": OPEN, "target": {"memory_bytes": 10**9, "context_tokens": 100, "batch_rows": 2}},
        {"depth": None, "width": {"mlp": "target", "heads": 2}, "target": {"tokens_per_s": 100.0}},
        {"depth": None, "width": {"mlp": 0.5}, "steps": (step(depth=OPEN, target={"speedup": 1.5}),)},
        {"depth": {"metric": "explicit", "blocks": ()}, "steps": (step(num_steps=None, num_epochs=0.5),)},
        {
            "steps": (step(arm={**ARM, "data": "distilled", "objective": {"top_k_kl": 1.0}}),),
            "generate": {"top_logprobs": 4},
        },
    ],
)
def test_prunings_and_steps_that_are_fine_survive_yaml(tmp_path: Path, parts: dict) -> None:
    recipe = Recipe.parse(pruned(tmp_path, **parts))
    assert Recipe.parse(parse_yaml(recipe.to_yaml())) == recipe


def test_each_pruning_in_turn(tmp_path: Path) -> None:
    first = step(num_steps=7)
    second = step(
        depth={"metric": "tail", **OPEN},
        width={"mlp": "target"},
        target={"parameters": 0.5},
        patch={"ridge": 0.5},
        arm={**ARM, "learning_rate": 0.5},
        num_steps=None,
        num_epochs=0.25,
        distil_from="previous",
    )
    steps = (first, second, step(depth=None, width={"heads": 2}))
    merges = {"m": {"arms": ("sft", "sdft")}}
    recipe = Recipe.parse(pruned(tmp_path, steps=steps, width={"hidden": 0.5}, merges=merges))
    found = recipe.prunings
    assert list(found) == ["step1", "step2", "step3", ""]
    assert found[""] is recipe
    for number, name in enumerate(("step1", "step2", "step3")):
        part, asked = found[name], recipe.steps[number]
        assert (part.steps, part.merges) == ((), {})
        for field in ("depth", "width", "target", "patch", "distil_from"):
            assert getattr(part, field) == getattr(asked, field)
        assert part.train.arms == {name: asked.arm}
        assert (part.train.num_steps, part.train.num_epochs) == (asked.num_steps, asked.num_epochs)
        unlike = {"arms", "num_steps", "num_epochs"}
        assert part.train.model_dump(exclude=unlike) == recipe.train.model_dump(exclude=unlike)
        for field in ("name", "teacher", "seed_set", "calibration", "generate", "evaluate"):
            assert getattr(part, field) == getattr(recipe, field)
        assert recipe.for_pruning(name) == part
    assert (found["step1"].depth.remove_blocks, found["step1"].train.num_steps) == (1, 7)
    assert (found["step2"].depth.metric, found["step2"].target) == ("tail", Target(parameters=0.5))
    assert (found["step3"].depth.blocks, found["step3"].width) == ((), Width(heads=2))
    assert recipe.for_pruning("pruned") is recipe
    assert list(make_recipe(tmp_path, tmp_path).prunings) == [""]


def test_a_recipe_with_everything_survives_yaml(tmp_path: Path) -> None:
    parts = {
        "description": "all at once",
        "depth": {"metric": "perplexity", "drop": "one", **OPEN},
        "width": {"hidden": "target", "mlp": 0.75, "heads": 2, "multiple_of": 8, "tensor_parallel": 2},
        "target": {"memory_bytes": 0.5, "context_tokens": 100, "batch_rows": 3},
        "patch": {},
        "distil_from": "previous",
        "steps": (
            step(target={"speedup": 1.25}, depth=OPEN, patch={"ridge": 0.125}),
            step(depth=None, width={"kv_groups": 1}, num_steps=None, num_epochs=1.5, distil_from="previous"),
        ),
    }
    recipe = Recipe.parse(pruned(tmp_path, **parts))
    text = recipe.to_yaml()
    assert Recipe.parse(parse_yaml(text)) == recipe
    assert text.startswith("name: tiny\ndescription: all at once\nteacher:\n")
    assert list(parse_yaml(text))[:6] == ["name", "description", "teacher", "seed_set", "calibration", "steps"]
    assert recipe.patch == Patch()


def test_a_depth_that_keeps_every_block_is_written_down(tmp_path: Path) -> None:
    recipe = Recipe.parse(pruned(tmp_path, depth={"metric": "explicit", "blocks": ()}))
    text = recipe.to_yaml()
    assert parse_yaml(text)["depth"] == {"metric": "explicit", "blocks": []}
    again = Recipe.parse(parse_yaml(text))
    assert again == recipe
    assert again.to_yaml() == text
    narrow = Recipe.parse(pruned(tmp_path, depth=None, width={"mlp": 0.5}))
    assert "depth" not in parse_yaml(narrow.to_yaml())
    assert Recipe.parse(parse_yaml(narrow.to_yaml())) == narrow


def test_a_step_that_keeps_every_block_is_written_down(tmp_path: Path) -> None:
    """Nothing is removed and the arm heals all the same, as a control beside a recipe whose step does remove."""
    recipe = Recipe.parse(pruned(tmp_path, steps=(step(depth={"metric": "explicit", "blocks": ()}),)))
    assert Recipe.parse(parse_yaml(recipe.to_yaml())) == recipe


def test_each_pruning_of_a_recipe_survives_yaml(tmp_path: Path) -> None:
    steps = (step(), step(depth=None, width={"mlp": 0.5}))
    recipe = Recipe.parse(pruned(tmp_path, steps=steps))
    for part in recipe.prunings.values():
        assert Recipe.parse(parse_yaml(part.to_yaml())) == part


def test_every_recipe_on_paper_begins_with_its_name(tmp_path: Path) -> None:
    for parts in ({}, {"replicate": 2}, {"depth": None, "width": {"mlp": 0.5}}, {"steps": (step(),), "patch": {}}):
        assert Recipe.parse(pruned(tmp_path, **parts)).to_yaml().startswith("name: tiny\n")
