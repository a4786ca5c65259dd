"""What an evaluation can tell, before it runs and after: how many items, and how often models differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_ray.cli.render import _detectable_line
from sdft_ray.pipeline.detectable import Detectable, detectable
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.graph import State, Step
from sdft_ray.statistics.detectable import detectable_difference
from sdft_ray.statistics.scores import Scores, TaskScore
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import MANIFEST, Store

SMOLLM2 = Path(__file__).resolve().parents[3] / "jobs/recipes/smollm2_135m.yaml"


def evaluated(tmp_path: Path, model: str, values: list[float]) -> State:
    address = f"evaluate/{model:0>16}"
    score = TaskScore("t", "acc", "none", sum(values) / len(values), None, len(values), 0, True, 0.5,
                      {str(i): value for i, value in enumerate(values)})  # fmt: skip
    folder = tmp_path / address
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")
    (folder / files.SCORES).write_text(json.dumps(Scores({"t": score}).to_json()), encoding="utf-8")
    manifest = Manifest(
        f"evaluate:{model}", "evaluate", address, "f", "{}", {}, {}, Usage(), {"scores": {"t": {"n": len(values)}}}
    )
    return State(Step("evaluate", {}, subject=model), "done", address, manifest=manifest)


def test_before_anything_ran_the_limits_count_and_the_share_is_assumed(tmp_path: Path) -> None:
    found = detectable(Recipe.load(SMOLLM2), Store(str(tmp_path)), {})
    assert found.num_items["mmlu"] == 57 * 10
    assert found.num_items["piqa"] == 500
    assert (found.is_limit, found.num_pairs, found.discordant) == (True, 0, 0.2)
    assert found.mean == detectable_difference([*[500] * 8, 570], 0.2)
    assert found.smallest == detectable_difference([500], 0.2)
    line = _detectable_line(found)
    assert "9 tasks, at most 4,570 items" in line
    assert "if 20 % of the items are right in exactly one of the two (an assumption)" in line


def test_without_limits_nothing_is_guessed(tmp_path: Path) -> None:
    recipe = Recipe.load(SMOLLM2)
    asked = recipe.evaluate.model_copy(update={"limit": {"piqa": 100}})
    found = detectable(recipe.model_copy(update={"evaluate": asked}), Store(str(tmp_path)), {})
    assert found.mean is None
    assert found.smallest == detectable_difference([100], 0.2)
    assert "not counted" in _detectable_line(found)
    asked = recipe.evaluate.model_copy(update={"limit": None})
    found = detectable(recipe.model_copy(update={"evaluate": asked}), Store(str(tmp_path)), {})
    assert _detectable_line(found).endswith("is known once the number of items is (evaluate.limit)")


def test_what_was_evaluated_counts(tmp_path: Path) -> None:
    """Teacher aside, three models that differ on 10, 20 and 30 of 200 items."""
    store = Store(str(tmp_path))
    right = {"teacher": 200, "pruned": 100, "sft": 110, "sdft": 130}
    states = {
        f"evaluate:{model}": evaluated(tmp_path, model, [float(i < num) for i in range(200)])
        for model, num in right.items()
    }
    found = detectable(Recipe.load(SMOLLM2), store, states)
    assert (found.num_items, found.is_limit, found.num_pairs) == ({"t": 200}, False, 3)
    assert found.discordant == pytest.approx((10 + 20 + 30) / 3 / 200)
    assert found.mean == found.smallest == detectable_difference([200], found.discordant)
    assert "measured on 3 pairs of models" in _detectable_line(found)


def test_too_few_items() -> None:
    found = Detectable({"t": 5}, True, 0.2, 0, None, None)
    assert "too few to tell two models apart" in _detectable_line(found)
