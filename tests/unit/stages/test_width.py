"""Width from measurement to checkpoint, stage by stage in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.errors import PlanError
from sdft_ray.importance.width import WidthMoments
from sdft_ray.models.checkpoint import SINGLE_FILE
from sdft_ray.models.loading import load_model
from sdft_ray.models.size import size_with_blocks
from sdft_ray.models.source import ModelSource, read_config
from sdft_ray.pipeline.explain import _outcome
from sdft_ray.pipeline.preflight import planned_size
from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages import measure, plan, prune
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.jobs import make_job
from tests.support.recipes import make_recipe
from tests.support.staged import commit_output, output_of
from tests.support.tiny import make_model
from tests.support.worlds import RESOURCES

CALIBRATION, MEASURE = "calibration/" + "1" * 16, "measure/" + "2" * 16
PLAN, PRUNE = "plan/" + "3" * 16, "prune/" + "4" * 16
WIDTH = {"hidden": 0.75, "mlp": 40, "heads": 0.5}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    make_model(tmp_path / "teacher", "qwen3", head_dim=8)
    recipe = make_recipe(tmp_path, tmp_path / "teacher", depth={"metric": "tail", "remove_blocks": 1}, width=WIDTH)
    store = Store(str(tmp_path / "store"))
    store.check_writable()
    row = {"instruction": "what is", "context": "", "answer_kind": "number", "check": "", "family": ""}
    rows = [{**row, "example_id": str(i), "reference_response": "it is " * (i + 1)} for i in range(9)]
    folder = tmp_path / "store" / CALIBRATION
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SEED_SCHEMA), folder / files.ROWS)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")
    return recipe


def _job(folder: Path, recipe: Recipe, step: str, address: str, **inputs: str) -> StageContext:
    source = ModelSource(directory=str(folder / "teacher"))
    return make_job(step, address, str(folder / "store"), recipe, RESOURCES, source, inputs)


def test_the_most_active_channels_of_a_run_stay(recipe: Recipe, tmp_path: Path) -> None:
    job = _job(tmp_path, recipe, "measure", MEASURE, calibration=CALIBRATION)
    measured = commit_output(job, measure._stored(job, [measure._shard(job, index, 2) for index in range(2)]))
    whole = WidthMoments.from_bytes(measure._shard(job, 0, 1)[0][files.WIDTH_MOMENTS])
    content = (measured / files.WIDTH_MOMENTS).read_bytes()
    found = WidthMoments.from_bytes(content)
    assert found.num_sequences == whole.num_sequences == 9
    assert found.to_bytes() == WidthMoments.from_bytes(found.to_bytes()).to_bytes()
    for key, values in whole.sums.items():
        np.testing.assert_allclose(found.sums[key], values, rtol=1e-5)

    planning = _job(tmp_path, recipe, "plan", PLAN, measure=MEASURE)
    made = plan.run(planning)
    assert made.summary["widths"] == {"hidden": [24, 32], "mlp": [40, 64], "heads": [2, 4]}
    chosen = PruningPlan.from_json((commit_output(planning, made) / files.PLAN).read_text(encoding="utf-8"))
    assert made.summary["plan"] == chosen.identity()
    assert chosen.keep_blocks == (0, 1, 2)
    assert chosen.channels.hidden == tuple(sorted(np.argsort(-found.scores("hidden"))[:24].tolist()))
    assert chosen.channels.mlp is not None
    assert chosen.channels.mlp[2] == tuple(sorted(np.argsort(-found.scores("mlp")[2])[:40].tolist()))

    pruning = _job(tmp_path, recipe, "prune", PRUNE, plan=PLAN)
    made = prune._prune(pruning)
    config = read_config(job.teacher.source, None)
    assert config is not None
    sizes = made.summary["sizes"]
    planned = planned_size(recipe, config)
    assert planned is not None
    assert sizes["pruned"]["num_parameters"] == planned.num_parameters
    assert sizes["teacher"]["num_parameters"] == size_with_blocks(config, 4).num_parameters
    model = load_model(output_of(pruning), "float32")
    assert sum(weight.numel() for weight in model.parameters()) == sizes["pruned"]["num_parameters"]
    assert bool(torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all())


def test_without_width_nothing_more_is_measured(recipe: Recipe, tmp_path: Path) -> None:
    narrow = recipe.model_copy(update={"width": None})
    plain = _job(tmp_path, narrow, "measure", MEASURE, calibration=CALIBRATION)
    assert set(measure._shard(plain, 0, 1)[0]) == {files.DEPTH_PARTS}


def test_a_plan_for_another_model_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    other = PruningPlan("qwen3", 5, (0, 1, 2))
    (tmp_path / "store" / PLAN).mkdir(parents=True)
    (tmp_path / "store" / PLAN / files.PLAN).write_text(other.to_json(), encoding="utf-8")
    (tmp_path / "store" / PLAN / MANIFEST).write_text("{}", encoding="utf-8")
    with pytest.raises(PlanError, match="the plan is for a qwen3 of 5 blocks, the model is a qwen3 of 4"):
        prune._prune(_job(tmp_path, recipe, "prune", PRUNE, plan=PLAN))


def test_a_token_without_an_embedding_is_named(recipe: Recipe, tmp_path: Path) -> None:
    """In the artifact, and after `done` in the plan of work."""
    name = "model.embed_tokens.weight"
    tensors = load_file(tmp_path / "teacher" / SINGLE_FILE)
    job = _job(tmp_path, recipe, "measure", MEASURE, calibration=CALIBRATION)
    token = int(measure.calibration(job)[0][0][0, 1])
    tensors[name][token] = 0
    save_file(tensors, tmp_path / "teacher" / SINGLE_FILE, metadata={"format": "pt"})
    result = measure._stored(job, [measure._shard(job, index, 2) for index in range(2)])
    (told,) = result.summary["zero_tokens"]
    assert told.endswith(f"(id {token})")
    assert result.summary["zero_tokens"][told] > 0
    assert told in _outcome(job.step, result.summary)
