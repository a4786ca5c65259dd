"""Old names of fields: read as before with a warning, written never, and no identity moves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.arms import Objective, Train
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.study import Study, groups, rate_recipe
from sdft_ray.recipe.yaml_model import RenamedFieldWarning, canonical, dump_yaml, old_names, parse_yaml
from sdft_ray.stages.graph import nearest, resolve
from sdft_ray.stages.sources import Sources
from sdft_ray.store.fingerprint import canonical_json
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model

TRAIN: dict[str, tuple[str, Any]] = {
    "row_tokens": ("max_seq_len", 96),
    "rows_per_step": ("global_batch_size", 3),
    "held_out": ("validation_fraction", 0.25),
    "tail_blocks": ("train_last_n_layers", 2),
    "clip_norm": ("max_grad_norm", 0.5),
}
"""Old name -> present name, and a value that is no default."""
ARMS = {"kd": {"data": "distilled", "learning_rate": 1e-3, "objective": {"forward_kl": 1.0}}}


def data(folder: Path, *, old: bool) -> dict[str, Any]:
    """A recipe with a value for each renamed field, by its old or its present name."""
    train = {name if old else present: value for name, (present, value) in TRAIN.items()}
    train["long_rows" if old else "long_examples"] = "cut_prompt" if old else "truncate_prompt"
    objective = {**ARMS["kd"]["objective"], "signals" if old else "teacher_logits": "cached"}  # type: ignore[dict-item]
    train |= {"num_steps": 2, "arms": {"kd": {**ARMS["kd"], "objective": objective}}}
    generate = {"max_tokens": 16, "hidden_states": True}
    return recipe_data(folder, folder / "teacher", train=train, generate=generate)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher", "llama")
    return folder


def parsed(plain: dict[str, Any], **options: Any) -> tuple[Recipe, list[str]]:
    """The recipe, and what was warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        recipe = Recipe.parse(plain, **options)
    assert all(issubclass(warning.category, RenamedFieldWarning) for warning in seen)
    return recipe, [str(warning.message) for warning in seen]


def test_both_spellings_are_one_recipe_with_the_same_fingerprints(world: Path) -> None:
    new, nothing = parsed(data(world, old=False))
    old, warned = parsed(data(world, old=True))
    assert nothing == []
    assert new == old
    store = Store(str(world / "store"))
    states = [resolve(recipe, store, Sources(recipe, store)) for recipe in (new, old)]
    assert {name: state.fingerprint for name, state in states[0].items()} == {
        name: state.fingerprint for name, state in states[1].items()
    }
    expected = {f"train.{name} was renamed to train.{present}" for name, (present, _) in TRAIN.items()}
    expected |= {
        "train.long_rows was renamed to train.long_examples",
        "the value cut_prompt of long_examples was renamed to truncate_prompt",
        "objective.signals was renamed to objective.teacher_logits",
    }
    assert {line.partition(";")[0] for line in warned} == expected


def test_identity_keeps_the_first_names(world: Path) -> None:
    recipe, _ = parsed(data(world, old=False))
    kept = canonical(recipe.train, exclude={"arms"})
    assert kept == {name: value for name, (_, value) in TRAIN.items()} | {"long_rows": "cut_prompt", "num_steps": 2}
    assert canonical(recipe.train.trials["kd"].objective) == {"forward_kl": 1.0, "signals": "cached"}


def test_a_recipe_is_written_with_present_names(world: Path) -> None:
    recipe, _ = parsed(data(world, old=True))
    text = recipe.to_yaml()
    assert not [name for model in (Train, Objective) for name in old_names(model) if f"{name}:" in text]
    assert "cut_prompt" not in text
    again, warned = parsed(parse_yaml(text))
    assert again == recipe
    assert warned == []


def test_a_warning_is_shown_once(world: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            Recipe.parse({**data(world, old=False), "train": {"num_steps": 1, "arms": ARMS, "held_out": 0.111}})
    assert [str(warning.message).partition(";")[0] for warning in seen] == [
        "train.held_out was renamed to train.validation_fraction"
    ]


def test_what_an_earlier_version_wrote_is_read_in_silence(world: Path) -> None:
    recipe, warned = parsed(data(world, old=True), stored=True)
    assert recipe == parsed(data(world, old=False))[0]
    assert warned == []


def test_both_names_at_once_are_refused(world: Path) -> None:
    plain = data(world, old=False)
    plain["train"]["row_tokens"] = 96
    with pytest.raises(RecipeError, match="row_tokens is the old name of max_seq_len: give only max_seq_len"):
        Recipe.parse(plain)


def test_a_misspelt_field_is_compared_with_present_names(world: Path) -> None:
    plain = data(world, old=False)
    plain["train"]["max_seq_length"] = 96
    with pytest.raises(RecipeError, match=r"unknown field 'train.max_seq_length'.*did you mean 'max_seq_len'"):
        Recipe.parse(plain)


def test_resources_take_the_old_name_too() -> None:
    with pytest.warns(RenamedFieldWarning, match="train.micro_batch_rows was renamed to train.micro_batch_size"):
        old = Resources.model_validate({"train": {"micro_batch_rows": 2}})
    assert old == Resources.model_validate({"train": {"micro_batch_size": 2}})
    assert "micro_batch_size" in old.model_dump()["train"]


@pytest.mark.parametrize("old_base", [True, False])
def test_changes_of_a_study_replace_a_field_whatever_it_is_called(world: Path, tmp_path: Path, old_base: bool) -> None:
    base = data(world, old=old_base)
    base["train"].pop("arms")
    (tmp_path / "recipe.yaml").write_text(dump_yaml(base), encoding="utf-8")
    layers = "train_last_n_layers" if old_base else "tail_blocks"
    arm = {"data": "reference", "recipe": {"train": {layers: 1}}}
    study = {"name": "s", "recipe": "./recipe.yaml", "arms": {"a": arm}, "num_rows": [2], "learning_rates": [0.1]}
    (tmp_path / "study.yaml").write_text(dump_yaml(study), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = groups(loaded := Study.load(tmp_path / "study.yaml"))
        assert rate_recipe(loaded, group).train.train_last_n_layers == 1


def test_explain_names_a_changed_field_as_recipes_do(world: Path) -> None:
    store = Store(str(world / "explained"))
    store.check_writable()
    recipe, _ = parsed(data(world, old=False))
    done = resolve(recipe, store, Sources(recipe, store))["select"]
    identity = canonical_json(done.identity)
    store.commit(Manifest("select", "select", done.address, done.fingerprint, identity, {}, {}, Usage()))
    longer, _ = parsed({**data(world, old=False), "train": {**data(world, old=False)["train"], "max_seq_len": 64}})
    found = nearest(resolve(longer, store, Sources(longer, store))["select"], store)
    assert found is not None
    assert found[1] == ["max_seq_len: 96 → 64"]
