from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sdft_ray.errors import RecipeError, ResourceError, StageError, UserError
from sdft_ray.recipe import Recipe
from sdft_ray.recipe_arms import Objective
from sdft_ray.recipe_pruning import Patch, Target, Width
from sdft_ray.resources import Resources
from sdft_ray.yaml_model import parse_yaml
from tests.recipes import make_recipe, recipe_data


def test_yaml_round_trip_gives_an_equal_recipe(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


def test_relative_places_start_at_the_recipes_folder(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("", encoding="utf-8")
    text = recipe.to_yaml().replace(str(tmp_path / "seed.jsonl"), "rows.jsonl")
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    assert Recipe.load(folder / "r.yaml").seed_set.source == str(folder / "rows.jsonl")


ARM = {"data": "reference", "learning_rate": 1.0}


def cached(objective: dict, data: str = "distilled", **generate: object) -> dict:
    """An arm `kd` with an objective, and what the teacher is asked for."""
    arm = {"data": data, "learning_rate": 1.0, "objective": objective}
    return {"train": {"num_steps": 1, "arms": {"kd": arm}}, "generate": generate}


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        ({"tracher": {}}, "unknown field 'tracher'", "'teacher'"),
        ({"depth": {"remove_block": 1}}, "unknown field 'depth.remove_block'", "'remove_blocks'"),
        ({"depth": {"remove_blocks": 1, "keep_parameters": 0.5}}, "exactly one of", "correct"),
        ({"depth": {"metric": "explicit"}}, "takes `blocks`", "correct"),
        ({"depth": {"remove_blocks": 0}}, "depth.remove_blocks", "correct"),
        ({"depth": {"remove_blocks": "2"}}, "depth.remove_blocks", "correct"),
        ({"train": {"num_steps": 1, "arms": {}}}, "train.arms", "correct"),
        (
            {"train": {"num_steps": 1, "arms": {"teacher": {"data": "reference", "learning_rate": 1.0}}}},
            "'teacher'",
            "",
        ),
        (
            {"train": {"arms": {"a": {"data": "reference", "learning_rate": 1.0}}}},
            "exactly one of num_steps",
            "",
        ),
        (
            {"train": {"num_steps": 1, "arms": {"a": {"data": "reference", "learnin_rate": 1.0}}}},
            "learnin_rate",
            "learning_rate",
        ),
        ({"evaluate": {"tasks": ({"name": "a"}, {"name": "a"})}}, "named twice", ""),
        ({"evaluate": {"tasks": ({"name": "a"},), "tuned": ("b",)}}, "'b'", ""),
        (
            {"train": {"num_steps": 1, "arms": {"a": {**ARM, "objective": {"cross_entropy": 0.0}}}}},
            "a term with a weight above 0",
            "",
        ),
        ({"train": {"num_steps": 1, "arms": {"a": {**ARM, "objective": {"forward_lk": 1.0}}}}}, "", "'forward_kl'"),
        ({"train": {"num_steps": 1, "arms": {"a": ARM}, "lora": {}, "tail_blocks": 1}}, "not both", ""),
        ({"merges": {"m": {"arms": ("sft", "stf")}}}, "not sft and stf", ""),
        ({"merges": {"m": {"arms": ("sft", "sft")}}}, "two different arms", ""),
        ({"merges": {"sdft": {"arms": ("sft", "sdft")}}}, "'sdft' cannot name a merge", ""),
        ({"merges": {"m": {"arms": ("sft", "sdft"), "t": (0.5, 1.5)}}}, "merges.m.t", ""),
        ({"name": "no spaces allowed"}, "name", ""),
        (cached({"top_k_kl": 1.0}), "train.arms.kd: top_k_kl needs generate.top_logprobs", ""),
        (cached({"top_k_kl": 1.0}, hidden_states=True), "train.arms.kd: top_k_kl needs generate.top_logprobs", ""),
        (cached({"reverse_kl": 1.0, "signals": "cached"}), "kd: reverse_kl needs generate.hidden_states", ""),
        (cached({"top_k_kl": 1.0}, "reference", top_logprobs=4), "train.arms.kd: top_k_kl from cached", ""),
        (cached({"top_k_kl": 1.0, "temperature": 2.0}, top_logprobs=4), "top_k_kl is for temperature 1", ""),
        (
            cached({"top_k_kl": 1.0, "forward_kl": 1.0}, top_logprobs=4),
            "top_k_kl reads cached signals and forward_kl needs the teacher online; leave one out, or set signals",
            "",
        ),
        (
            cached({"forward_kl": 1.0, "hidden_mse": 1.0, "signals": "cached"}, hidden_states=True),
            "hidden_mse needs the teacher online; leave one out",
            "",
        ),
        (cached({"signals": "cached"}, hidden_states=True), "signals: cached is for forward_kl", ""),
        (cached({"top_k_kl": 1.0, "signals": "cached"}, top_logprobs=4), "signals: cached is for forward_kl", ""),
    ],
)
def test_mistakes_are_named_with_a_next_step(tmp_path: Path, change: dict, says: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe_data(tmp_path, tmp_path, **change))
    assert says in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_missing_part_is_named(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path)
    del data["calibration"]
    with pytest.raises(RecipeError, match="'calibration' is missing"):
        Recipe.parse(data)


def test_depth_or_width_or_both(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path)
    assert Recipe.parse({**data, "width": {"mlp": 0.5, "heads": 2}}).width is not None
    del data["depth"]
    with pytest.raises(RecipeError, match="say what to prune: depth, width, or both"):
        Recipe.parse(data)
    assert Recipe.parse({**data, "width": {"mlp": 0.5}}).depth.blocks == ()
    with pytest.raises(RecipeError, match="name a space to prune"):
        Recipe.parse({**data, "width": {"multiple_of": 64}})
    for share in (0, 1.0, -0.5, 1.5):
        with pytest.raises(RecipeError, match="width"):
            Recipe.parse({**data, "width": {"mlp": share}})


def test_hidden_states_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    arm = {"data": "reference", "learning_rate": 1e-3, "objective": {"hidden_mse": 1.0}}
    train = {**recipe_data(tmp_path, tmp_path)["train"], "arms": {"match": arm}}
    assert Recipe.parse(recipe_data(tmp_path, tmp_path, train=train, width={"mlp": 0.5}))
    with pytest.raises(RecipeError, match=r"train.arms.match compares hidden states, and with width.hidden"):
        Recipe.parse(recipe_data(tmp_path, tmp_path, train=train, width={"hidden": 0.5}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "line 2: the key 'name' is given twice"),
        ("name: [a\n", "line 2"),
        ("- 1\n", "holds no mapping"),
        ("", "holds no mapping"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        Recipe.load(path)


def test_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("name: a", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"did you mean quickstart\.yaml"):
        Recipe.load(tmp_path / "quickstrat.yaml")


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = make_recipe(tmp_path, tmp_path).to_yaml().replace("learning_rate: 0.001", "learning_rate: 1e-3")
    assert "1e-3" in text
    path.write_text(text, encoding="utf-8")
    assert Recipe.load(path).train.arms["sft"].learning_rate == 1e-3


def test_resources_name_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "resources.yaml"
    path.write_text("train: {num_worker: 2}\n", encoding="utf-8")
    with pytest.raises(ResourceError, match=r"'train\.num_worker' → did you mean 'num_workers'"):
        Resources.load(path)


@pytest.mark.parametrize("error", [UserError("a", "b"), RecipeError("a"), StageError("train", "it died")])
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_grid_of_merges_is_many_students(tmp_path: Path) -> None:
    arms = ("sft", "sdft")
    merges = {"one": {"arms": arms}, "grid": {"arms": arms, "t": (0.25, 0.5, 0.625), "kind": "linear"}}
    merged = Recipe.parse(recipe_data(tmp_path, tmp_path, merges=merges)).merged
    assert {name: t for name, (_, t) in merged.items()} == {
        "one": 0.5,
        "grid_25": 0.25,
        "grid_50": 0.5,
        "grid_62_5": 0.625,
    }
    assert merged["one"][0].kind == "slerp"


def test_where_each_term_has_the_teacher_from() -> None:
    both = Objective(forward_kl=1.0, jensen_shannon=1.0, top_k_kl=1.0, signals="cached")
    assert both.cached == {"forward_kl": "hidden_states", "jensen_shannon": "hidden_states", "top_k_kl": "top_logprobs"}
    assert both.terms == ("cross_entropy", "forward_kl", "jensen_shannon", "top_k_kl")
    assert not both.needs_teacher
    online = Objective(forward_kl=1.0, hidden_mse=1.0)
    assert online.needs_teacher
    assert online.cached == {}


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
        ({"target": {"parameters": 0.5}}, "target sets nothing: write `remove_blocks: target`"),
        ({"width": {"mlp": 0.5}, "target": {"parameters": 0.5}}, "target sets nothing"),
        ({"steps": (step(target={"parameters": 0.5}),)}, "steps.0: target sets nothing"),
        ({"depth": OPEN}, "an amount is left to the target, and there is none"),
        ({"width": {"hidden": "target"}}, "an amount is left to the target, and there is none"),
        ({"depth": None, "width": {"mlp": 0.5, "heads": "target"}}, "an amount is left to the target"),
        ({"steps": (step(), step(depth=OPEN)), "depth": OPEN, "target": {"parameters": 0.5}}, "steps.1: an amount"),
        ({"depth": OPEN, "target": {}}, "target: give exactly one of parameters, memory_bytes, speedup, tokens_per_s"),
        ({"depth": OPEN, "target": {"parameters": 0.5, "memory_bytes": 9}}, "target: give exactly one of parameters"),
        ({"depth": OPEN, "target": {"speedup": 2.0, "tokens_per_s": 9.0}}, "target: give exactly one of parameters"),
        (
            {"depth": OPEN, "target": {"parameters": 0.5, "context_tokens": 4096}},
            "target: context_tokens and batch_rows go with memory_bytes only",
        ),
        (
            {"depth": OPEN, "target": {"speedup": 2.0, "batch_rows": 2}},
            "target: context_tokens and batch_rows go with memory_bytes only",
        ),
        ({"depth": OPEN, "target": {"parameters": 1.0}}, "target.parameters"),
        ({"depth": OPEN, "target": {"memory_bytes": 0}}, "target.memory_bytes"),
        ({"depth": OPEN, "target": {"speedup": 1.0}}, "target.speedup"),
        ({"depth": {"remove_blocks": "open"}}, "depth.remove_blocks"),
        ({"depth": {"keep_parameters": "target"}}, "depth.keep_parameters"),
        ({"depth": {**OPEN, "keep_parameters": 0.5}, "target": {"parameters": 0.5}}, "depth: give exactly one of"),
        ({"depth": None, "width": {"mlp": 0.5}, "patch": {}}, "patch stands in for removed blocks"),
        ({"steps": (step(depth=None, width={"mlp": 0.5}, patch={}),)}, "steps.0: patch stands in for removed blocks"),
        ({"patch": {"ridge": 0.0}}, "patch.ridge"),
        ({"depth": None}, "say what to prune: depth, width, or both"),
        ({"steps": (step(depth=None),)}, "steps.0: say what to prune: depth, width, or both"),
    ],
)
def test_prunings_that_contradict_themselves(tmp_path: Path, parts: dict, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(pruned(tmp_path, **parts))
    assert f"recipe: {says}" in str(caught.value).replace("recipe: it: ", "recipe: ")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"distil_from": "previous"}, "distil_from: previous is for recipes with `steps`"),
        ({"steps": (step(num_steps=None),)}, "steps.0: give exactly one of num_steps, num_epochs"),
        ({"steps": (step(), step(num_epochs=1.0))}, "steps.1: give exactly one of num_steps, num_epochs"),
        ({"steps": (step(arm=None),)}, "'steps.0.arm' is missing"),
        (
            {"steps": (step(arm={**ARM, "learning_rate": (1e-3, 1e-4)}),)},
            "steps.0: the arm of an earlier step has one learning rate and one seed",
        ),
        (
            {"steps": (step(arm={**ARM, "seed": (0, 1)}),)},
            "steps.0: the arm of an earlier step has one learning rate and one seed",
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
                    step(arm={**ARM, "data": "distilled", "objective": {"forward_kl": 1.0, "signals": "cached"}}),
                ),
                "generate": {"top_logprobs": 4},
            },
            "steps.1.arm: forward_kl needs generate.hidden_states, which is off",
        ),
        (
            {"steps": (step(),), "train": arms(match=matching())},
            "train.arms.match compares hidden states block by block, which the model before this step has and the "
            "original no longer: set distil_from: previous",
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
    assert f"recipe: {says}" in str(caught.value).replace("recipe: it: ", "recipe: ")


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
        assert recipe.made_by(name) == part
    assert (found["step1"].depth.remove_blocks, found["step1"].train.num_steps) == (1, 7)
    assert (found["step2"].depth.metric, found["step2"].target) == ("tail", Target(parameters=0.5))
    assert (found["step3"].depth.blocks, found["step3"].width) == ((), Width(heads=2))
    assert recipe.made_by("pruned") is recipe
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
