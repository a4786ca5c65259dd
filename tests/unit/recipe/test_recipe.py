from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sdft_ray.errors import RecipeError, ResourceError, StageError, UserError
from sdft_ray.recipe.arms import Objective
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.yaml_model import dump_yaml, parse_yaml
from tests.support.recipes import make_recipe, recipe_data


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
        ({"depth": {"metric": "explicit"}}, "needs `blocks`", "correct"),
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
        ({"evaluate": {"tasks": ({"name": "a"}, {"name": "a"})}}, "listed twice", ""),
        ({"evaluate": {"tasks": ({"name": "a"},), "tuned": ("b",)}}, "'b'", ""),
        (
            {"train": {"num_steps": 1, "arms": {"a": {**ARM, "objective": {"cross_entropy": 0.0}}}}},
            "a term with a weight above 0",
            "",
        ),
        ({"train": {"num_steps": 1, "arms": {"a": {**ARM, "objective": {"forward_lk": 1.0}}}}}, "", "'forward_kl'"),
        ({"train": {"num_steps": 1, "arms": {"a": ARM}, "lora": {}, "train_last_n_layers": 1}}, "not both", ""),
        ({"merges": {"m": {"arms": ("sft", "stf")}}}, "not sft and stf", ""),
        ({"merges": {"m": {"arms": ("sft", "sft")}}}, "two different arms", ""),
        ({"merges": {"sdft": {"arms": ("sft", "sdft")}}}, "'sdft' is not a valid merge name", ""),
        ({"merges": {"m": {"arms": ("sft", "sdft"), "t": (0.5, 1.5)}}}, "merges.m.t", ""),
        ({"name": "no spaces allowed"}, "name", ""),
        (cached({"top_k_kl": 1.0}), "train.arms.kd: top_k_kl needs generate.top_logprobs", ""),
        (cached({"top_k_kl": 1.0}, hidden_states=True), "train.arms.kd: top_k_kl needs generate.top_logprobs", ""),
        (cached({"reverse_kl": 1.0, "teacher_logits": "cached"}), "kd: reverse_kl needs generate.hidden_states", ""),
        (cached({"top_k_kl": 1.0}, "reference", top_logprobs=4), "train.arms.kd: top_k_kl from cached", ""),
        (cached({"top_k_kl": 1.0, "temperature": 2.0}, top_logprobs=4), "top_k_kl needs temperature: 1", ""),
        (
            cached({"top_k_kl": 1.0, "forward_kl": 1.0}, top_logprobs=4),
            "top_k_kl reads cached signals and forward_kl needs the teacher online; remove one, or set teacher_lo",
            "",
        ),
        (
            cached({"forward_kl": 1.0, "hidden_mse": 1.0, "teacher_logits": "cached"}, hidden_states=True),
            "hidden_mse needs the teacher online; remove one",
            "",
        ),
        (
            cached({"teacher_logits": "cached"}, hidden_states=True),
            "teacher_logits: cached needs a weight above 0 for forward_kl",
            "",
        ),
        (
            cached({"top_k_kl": 1.0, "teacher_logits": "cached"}, top_logprobs=4),
            "teacher_logits: cached needs a weight above 0 for forward_kl",
            "",
        ),
    ],
)
def test_mistakes_are_named_with_a_next_step(tmp_path: Path, change: dict, says: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe_data(tmp_path, tmp_path, **change))
    assert says in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_custom_code_is_not_run(tmp_path: Path) -> None:
    """`false` is what recipes of before say by default; a stored `true` had no effect."""
    plain = recipe_data(tmp_path, tmp_path)
    trusting = {**plain, "teacher": {**plain["teacher"], "trust_remote_code": True}}
    with pytest.raises(RecipeError, match=r"teacher: trust_remote_code is no longer a field: custom code is not run"):
        Recipe.parse(trusting)
    without = Recipe.parse(plain)
    assert Recipe.parse({**plain, "teacher": {**plain["teacher"], "trust_remote_code": False}}) == without
    assert Recipe.parse(trusting, stored=True) == without


def test_missing_part_is_named(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path)
    del data["calibration"]
    with pytest.raises(RecipeError, match="'calibration' is missing"):
        Recipe.parse(data)


def test_depth_or_width_or_both(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path)
    assert Recipe.parse({**data, "width": {"mlp": 0.5, "heads": 2}}).width is not None
    del data["depth"]
    with pytest.raises(RecipeError, match="nothing to prune: set depth, width, or both"):
        Recipe.parse(data)
    assert Recipe.parse({**data, "width": {"mlp": 0.5}}).depth.blocks == ()
    with pytest.raises(RecipeError, match="nothing to prune: set at least one of hidden"):
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
        ("- 1\n", "is not a YAML mapping"),
        ("", "is not a YAML mapping"),
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
    both = Objective(forward_kl=1.0, jensen_shannon=1.0, top_k_kl=1.0, teacher_logits="cached")
    assert both.cached == {"forward_kl": "hidden_states", "jensen_shannon": "hidden_states", "top_k_kl": "top_logprobs"}
    assert both.terms == ("cross_entropy", "forward_kl", "jensen_shannon", "top_k_kl")
    assert not both.needs_teacher
    online = Objective(forward_kl=1.0, hidden_mse=1.0)
    assert online.needs_teacher
    assert online.cached == {}


@pytest.mark.parametrize("text", ["1e3", "-2E+5", "1_0e5", "null", "2026-01-01", "0.5", "a\x85b", " \u2028"])
def test_a_text_that_reads_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text})) == {"name": text}


def test_a_date_that_no_calendar_has(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: 2026-13-45\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="put text values in quotes"):
        Recipe.load(path)
