"""Pruning in steps, with a patch at every cut and a size that a measured speed decides, on real Ray; then, why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdft_ray.analysis.why import why, why_json
from sdft_ray.models.loading import load_model
from sdft_ray.pipeline.compress import block_removal_scores, compress
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.report.run.why import shown
from tests.support.worlds import ONE_WORKER, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

RESOURCES = Resources.model_validate(ONE_WORKER)
ARM = {"data": "reference", "learning_rate": 1e-3, "objective": {"forward_kl": 1.0}}


@pytest.fixture(scope="module")
def run(world: Path) -> Run:
    data = world_data(world)
    first = {"depth": {"metric": "best", "remove_blocks": 1}, "arm": ARM, "num_steps": 1}
    recipe = Recipe.parse(
        {
            **data,
            "steps": (first,),
            "depth": {"metric": "tail", "remove_blocks": 1},
            "width": {"mlp": "target"},
            "target": {"tokens_per_s": 0.001},  # whatever the machine does: the largest model is fast enough
            "patch": {"ridge": 0.1},
            "distil_from": "previous",
            "train": {**data["train"], "arms": {"kd": ARM}},
        }
    )
    return compress(recipe, str(world / "store"), RESOURCES, name="steps", view="none")


def _weights(run: Run, step: str) -> dict[str, torch.Tensor]:
    return load_file(run.store.path(run.manifests[step].address) / "model.safetensors")


def test_each_step_starts_from_the_student_of_the_one_before(run: Run) -> None:
    of = run.manifests
    previous = of["train:step1"].address
    for step in ("rate", "measure", "plan", "prune", "patch"):
        assert of[step].inputs["start"] == previous, step
        assert "start" not in of.get(f"{step}:step1", of["seed"]).inputs
    assert of["train:step1"].inputs["pruned"] == of["prune:step1"].address
    assert "online_teacher" not in of["train:step1"].inputs, "the first compares with the original"
    assert of["train:kd"].inputs["pruned"] == of["patch"].address
    assert of["train:kd"].inputs["online_teacher"] == previous
    blocks = {step: len(of[step].summary["plan"]["keep_blocks"]) for step in ("plan:step1", "plan")}
    assert blocks == {"plan:step1": 3, "plan": 2}
    compared = of["plan:step1"].summary["candidates"]
    (chosen,) = set(range(4)) - set(of["plan:step1"].summary["plan"]["keep_blocks"])
    assert min(compared, key=lambda one: one["loss"])["blocks"] == [chosen]
    student = load_model(run.student_path("kd"), "float32")
    assert student.config.num_hidden_layers == 2
    sizes = of["prune"].summary["sizes"]
    assert sizes["teacher"]["num_blocks"] == 4
    assert sum(weight.numel() for weight in student.parameters()) == sizes["pruned"]["num_parameters"]


def test_a_patch_changes_the_block_before_the_cut_and_nothing_else(run: Run) -> None:
    before, after = _weights(run, "prune"), _weights(run, "patch")
    ((block, damaged, mended),) = run.manifests["patch"].summary["residuals"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight"}
    assert mended < damaged
    assert set(run.to_json()["scores"]) == {"teacher", "pruned", "patched", "kd"}


def test_a_speed_chooses_the_largest_model_that_has_it(run: Run) -> None:
    summary = run.manifests["rate"].summary
    assert all(tried["enough"] for tried in summary["tried"])
    assert summary["tried"][-1]["model"] == summary["chosen"]
    assert "2 blocks, hidden 32, mlp 64" in summary["chosen"], "without a block it is fast enough as wide as it was"
    assert run.manifests["plan"].summary["widths"] == {}


def test_why_tells_what_each_removal_costs_and_asks_only_once(run: Run) -> None:
    found = why(run, RESOURCES, num_candidates=2, limit=4, view="none")
    (chosen,) = [candidate for candidate in found.candidates if candidate.chosen]
    assert chosen.blocks == found.plan.removed_blocks == (2,)
    assert found.whole is not None
    assert found.whole["tiny_task"]["n"] == 4
    told = json.loads(why_json(found))
    assert [set(candidate["scores"]) for candidate in told["candidates"]] == [{"tiny_task"}] * 2
    assert told["channels"] == []
    assert len(shown(found).renderables) >= 3
    again = block_removal_scores(
        run, [(), *(candidate.blocks for candidate in found.candidates)], RESOURCES, limit=4, view="none"
    )
    assert again == [found.whole, *(candidate.scores for candidate in found.candidates)]
    assert len(list(run.store.manifests("why"))) == 3
