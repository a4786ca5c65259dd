"""Studies: what a grid comes to, the recipes that it stands for, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import DataError, RecipeError
from sdft_ray.lab.export import export
from sdft_ray.pipeline.study import run_study
from sdft_ray.recipe.study import (
    Study,
    arm_name,
    groups,
    laid_over,
    rate_recipe,
    seed_recipe,
    size_of_study,
)
from sdft_ray.recipe.yaml_model import dump_yaml, parse_yaml
from sdft_ray.stages.graph import steps
from sdft_ray.store.store import Store

STUDIES = sorted((Path(__file__).resolve().parents[3] / "jobs/studies").glob("*.yaml"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("lab"), study=True)


def study_of(lab: Path, **changes: Any) -> Study:
    data = parse_yaml((lab / "study.yaml").read_text(encoding="utf-8"))
    path = lab / "changed.yaml"
    path.write_text(dump_yaml({**data, **changes}), encoding="utf-8")
    return Study.load(path)


def test_the_laboratory_study_is_what_it_says(lab: Path) -> None:
    size = size_of_study(study_of(lab))
    # Two sets, two depths, four arms (the tail in recipes of its own), five sizes, five seeds; four rates at one size.
    assert (size.num_recipes, size.num_cells) == (8, 80)
    assert (size.num_rate_trainings, size.num_seed_trainings, size.num_trainings) == (64, 384, 448)
    everywhere = size_of_study(study_of(lab, rates_at=None, budget={}))
    assert (everywhere.num_rate_trainings, everywhere.num_seed_trainings) == (320, 320)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_make_recipes_within_their_budget(path: Path) -> None:
    study = Study.load(path)
    assert study.name == path.stem
    size = size_of_study(study)
    recipes = [rate_recipe(study, group) for group in groups(study)]
    assert len(recipes) == size.num_recipes
    assert sum(len(recipe.train.arms) * len(study.learning_rates) for recipe in recipes) == size.num_rate_trainings


def test_recipes_differ_where_the_axes_say_and_nowhere_else(lab: Path) -> None:
    study = study_of(lab)
    by_name = {group.name: rate_recipe(study, group) for group in groups(study)}
    deep = by_name["mixed-angular_distance-5-sft+sdft+sdft_kd"]
    tail = by_name["mixed-tail-5-tail"]
    assert deep.depth.remove_blocks == tail.depth.remove_blocks == 5
    assert (deep.depth.metric, tail.depth.metric) == ("angular_distance", "tail")
    assert (deep.train.train_last_n_layers, tail.train.train_last_n_layers) == (None, 3)
    words = by_name["word_problems-angular_distance-5-sft+sdft+sdft_kd"]
    assert words.evaluate.tuned == ("lab_word_problems",)
    assert deep.seed_set.source != words.seed_set.source
    same = {"name", "depth", "train", "seed_set", "evaluate"}
    assert deep.model_dump(exclude=same) == words.model_dump(exclude=same)
    assert deep.train.arms["sdft_kd_700"].objective.forward_kl == 1.0


def test_what_groups_and_phases_share_has_one_name(lab: Path) -> None:
    """Depths share data, arms share pruning, and a chosen trial is the training that the second phase asks for."""
    study = study_of(lab)
    first, *others = groups(study)
    chosen = {arm_name(arm, 700): study.learning_rates[1] for arm in first.arms}
    slices = {step.name: step.slice for step in steps(rate_recipe(study, first))}
    later = {step.name: step.slice for step in steps(seed_recipe(study, first, chosen))}
    assert slices["train:sdft_700@0.0007"] == later["train:sdft_700_s0"]
    assert slices["train:sdft_700@0.0007"] != later["train:sdft_700_s1"]
    assert "train:sdft_125@0.0007" not in slices
    assert later["train:sdft_125_s1"]["arm"]["learning_rate"] == 0.0007
    deeper = next(group for group in others if (group.variant, group.arms) == (first.variant, first.arms))
    data = {step.name: step.slice for step in steps(rate_recipe(study, deeper))}
    assert all(data[name] == slices[name] for name in ("seed", "generate", "select", "calibration"))
    assert data["plan"] != slices["plan"]


def test_an_arm_that_fixes_the_metric_stands_once(lab: Path) -> None:
    study = study_of(lab, metrics=["angular_distance", "block_influence"])
    names = [group.name for group in groups(study)]
    assert len(names) == len(set(names)) == 2 * 2 * 3
    assert size_of_study(study_of(lab, metrics=["angular_distance", "block_influence"], budget={})).num_cells == 140


def test_mappings_are_merged_and_all_else_is_replaced() -> None:
    base = {"a": {"b": 1, "c": (1, 2)}, "d": 4}
    assert laid_over(base, {"a": {"c": (3,), "e": 5}, "d": {"f": 6}}) == {
        "a": {"b": 1, "c": (3,), "e": 5},
        "d": {"f": 6},
    }
    assert base == {"a": {"b": 1, "c": (1, 2)}, "d": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": []}, "the grid is empty: num_rows"),
        ({"arms": {}}, "the grid is empty: arms"),
        ({"learning_rates": []}, "the grid is empty: learning_rates"),
        ({"seeds": [1, 1]}, "seeds lists a value twice"),
        ({"arms": {"a-b": {"data": "reference"}}}, "'a-b' is not a valid arm or variant name"),
        ({"sizes": [1]}, "unknown field 'sizes'"),
        ({"recipe": "./nowhere.yaml"}, "no file"),
        ({"budget": {"max_trainings": 447}}, "needs 448 trainings, but its budget is 447"),
        ({"rates_at": 500}, "rates_at is 500, which is not among num_rows"),
        ({"metrics": ["cosine"]}, "depth.metric"),
        ({"variants": {"x": {"seed_sets": {}}}}, "unknown field 'seed_sets'"),
        ({"arms": {"a": {"data": "reference", "recipe": {"train": {"arms": {}}}}}}, "cannot set train.arms"),
    ],
)
def test_what_is_refused_before_anything_starts(lab: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(lab, changes)


def planned(lab: Path, changes: dict[str, Any]) -> None:
    study = study_of(lab, **changes)
    size_of_study(study)
    for group in groups(study):
        rate_recipe(study, group)


def test_a_size_beyond_the_seed_set_is_refused_before_rates_are_tried(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"num_rows is 9,000, but there are only 4,\d\d\d training rows"):
        run_study(study_of(lab, num_rows=[700, 9000]), Store(str(tmp_path / "store")), view="none")


def test_a_part_of_a_study_is_the_same_recipes() -> None:
    whole = Study.load(next(path for path in STUDIES if path.stem == "smollm2_135m"))
    part = whole.only(["dolly_18", "gsm8k_mixed"])
    assert [group.variant for group in groups(part)] == ["dolly_18", "gsm8k_mixed"]
    by_name = {group.name: rate_recipe(whole, group) for group in groups(whole)}
    assert all(rate_recipe(part, group) == by_name[group.name] for group in groups(part))
    assert whole.only([]) == whole
    with pytest.raises(RecipeError, match="has no variant 'dolly' → it has dolly_24, gsm8k_24"):
        whole.only(["dolly"])


def test_the_study_of_a_small_model_is_what_it_says() -> None:
    """Three cuts of two sets, four arms, two sizes of which the larger has 2,000 rows, three seeds."""
    study = Study.load(next(path for path in STUDIES if path.stem == "smollm2_135m"))
    recipes = [rate_recipe(study, group) for group in groups(study)]
    assert [recipe.depth.remove_blocks for recipe in recipes] == [6, 6, 12, 12, 3, 3]
    assert [recipe.width is not None for recipe in recipes] == [False] * 4 + [True] * 2
    for recipe in recipes:
        assert recipe.forgetting is not None
        assert recipe.forgetting.source != recipe.seed_set.source
        assert recipe.seed_set.decontaminate.ngram == 13
        assert recipe.train.validation_fraction > 0
    size = size_of_study(study)
    assert (size.num_cells, size.num_trainings) == (48, 192)
    assert (study.num_rows, study.seeds) == ((500, 2000), (0, 1, 2))
