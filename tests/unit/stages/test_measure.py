"""Measurement and plan by `best`, stage by stage in this process, against models that really lack the blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.importance.moments import DepthMoments
from sdft_ray.models.loading import load_model
from sdft_ray.models.source import ModelSource
from sdft_ray.models.surgery import drop_blocks
from sdft_ray.pipeline.explain import _outcome
from sdft_ray.pruning.proposals import METRICS
from sdft_ray.stages import measure, plan
from sdft_ray.stages.job import StageContext, StageResult
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.jobs import make_job
from tests.support.recipes import make_recipe
from tests.support.staged import commit_output
from tests.support.tiny import make_model
from tests.support.worlds import RESOURCES

CALIBRATION, MEASURE, PLAN = "calibration/" + "1" * 16, "measure/" + "2" * 16, "plan/" + "3" * 16
NUM_BLOCKS = 6
ROWS = [
    {
        "example_id": str(i), "instruction": f"what is {i} plus {i * 7 % 5}", "context": "", "answer_kind": "number",
        "check": "", "family": "", "reference_response": f"it is {i} " * (i % 4 + 1),
    }
    for i in range(40)
]  # fmt: skip
Depth = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher", num_blocks=NUM_BLOCKS)
    Store(str(folder / "store")).check_writable()
    rows = folder / "store" / CALIBRATION
    rows.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS, schema=SEED_SCHEMA), rows / files.ROWS)
    (rows / MANIFEST).write_text("{}", encoding="utf-8")
    return folder


def _measured(root: Path, depth: Depth, number: int, num_tasks: int = 2, **sizes: Any) -> tuple[Path, StageResult]:
    """The folder of a measurement, under an address of its own, and the plan that follows from it."""

    def job(step: str, address: str, **inputs: str) -> StageContext:
        recipe = make_recipe(root, root / "teacher", depth=depth, **sizes)
        source = ModelSource(directory=str(root / "teacher"))
        return make_job(step, address, str(root / "store"), recipe, RESOURCES, source, inputs)

    address = MEASURE[:-1] + "abcdef01"[number]
    measuring = job("measure", address, calibration=CALIBRATION)
    shards = [measure._shard(measuring, index, num_tasks) for index in range(num_tasks)]
    proposed = measure._proposals(measuring, shards)
    compared = [measure._compared(measuring, i, num_tasks, proposed) for i in range(num_tasks)] if proposed else []
    folder = commit_output(measuring, measure._stored(measuring, shards, proposed, compared))
    planning = job("plan", PLAN[:-1] + "abcdef01"[number], measure=address)
    result = plan.run(planning)
    return folder, result


def _losses(directory: Path) -> float:
    """Nats per response token over all calibration rows, as transformers computes them."""
    chat, model = ChatFormat(load_tokenizer(directory)), load_model(directory, "float32")
    nats, num_tokens = 0.0, 0
    for row in ROWS:
        document = chat.encode(row["instruction"], row["reference_response"])
        ids, labels = torch.tensor([document.ids]), torch.tensor([document.ids])
        labels[~torch.tensor([document.loss_mask])] = -100
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=labels).loss) * sum(document.loss_mask)
        num_tokens += sum(document.loss_mask)
    return nats / num_tokens


def test_best_takes_the_candidate_without_which_the_model_loses_least(root: Path, tmp_path: Path) -> None:
    folder, result = _measured(root, {"metric": "best", "remove_blocks": 2}, 0)
    table = result.summary["candidates"]
    assert {name for one in table for name in one["metrics"]} == set(METRICS)
    assert len({tuple(one["blocks"]) for one in table}) == len(table) >= 3
    assert result.summary["compared"]["num_rows"] == len(ROWS)
    assert result.summary["compared"]["whole_loss"] == pytest.approx(_losses(root / "teacher"), abs=1e-4)
    for one in table:
        keep = [block for block in range(NUM_BLOCKS) if block not in one["blocks"]]
        drop_blocks(root / "teacher", tmp_path / "cut", keep)
        assert one["loss"] == pytest.approx(_losses(tmp_path / "cut"), abs=1e-4)
    chosen = min(table, key=lambda one: one["loss"])
    kept = result.summary["plan"]["keep_blocks"]
    assert sorted({*kept, *chosen["blocks"]}) == list(range(NUM_BLOCKS))
    assert len(kept) == NUM_BLOCKS - 2
    assert chosen["beyond"] == 0
    second = sorted(table, key=lambda one: one["loss"])[1]
    sure = result.summary["stability"]
    assert tuple(sure["runner_up"]) == tuple(second["blocks"])
    assert sure["difference"] == pytest.approx(second["beyond"])
    assert sure["stderr"] == pytest.approx(second["stderr"], rel=0.1), "a bootstrap over rows, and its linearised form"
    assert 0 < sure["share"] <= 1
    assert sure["num_parts"] == len(ROWS)
    told = _outcome(plan_step(root), result.summary)
    assert "the same blocks" in told
    losses = json.loads((folder / files.SET_LOSSES).read_text(encoding="utf-8"))
    assert losses["removed"] == [[], *(list(one["blocks"]) for one in table)]
    assert losses["row_R"] == list(range(len(ROWS)))


def plan_step(root: Path) -> Any:
    from sdft_ray.stages.graph import steps

    return {step.name: step for step in steps(make_recipe(root, root / "teacher"))}["plan"]


def test_the_number_of_tasks_changes_nothing(root: Path) -> None:
    (_, two), (_, one) = (_measured(root, {"metric": "best", "remove_blocks": 3}, 1 + n, n + 1) for n in (1, 0))
    assert two.summary["plan"] == one.summary["plan"]
    for first, second in zip(two.summary["candidates"], one.summary["candidates"], strict=True):
        assert first["blocks"] == second["blocks"]
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("number", "depth"),
    [
        (3, {"metric": "angular_distance", "position": "mean", "remove_blocks": 2}),
        (4, {"metric": "block_influence", "remove_blocks": 2}),
        (5, {"metric": "perplexity", "drop": "run", "remove_blocks": 2}),
    ],
)
def test_every_metric_says_how_sure_it_is(root: Path, number: int, depth: Depth) -> None:
    folder, result = _measured(root, depth, number)
    assert "candidates" not in result.summary
    sure = result.summary["stability"]
    assert sure["num_parts"] == measure.NUM_PARTS
    removed = set(range(NUM_BLOCKS)) - set(result.summary["plan"]["keep_blocks"])
    assert set(sure["runner_up"]) != removed
    assert len(sure["runner_up"]) == 2
    assert sure["difference"] >= 0
    assert sure["stderr"] > 0
    parts = [DepthMoments.from_json(json.dumps(p)) for p in json.loads((folder / files.DEPTH_PARTS).read_text())]
    scores = json.loads((folder / files.DEPTH_SCORES).read_text(encoding="utf-8"))
    assert len(parts) == measure.NUM_PARTS
    assert sum(part.num_tokens for part in parts) == scores["num_tokens"]
    if depth["metric"] == "angular_distance":
        start, other = min(removed), min(sure["runner_up"])
        row = scores["angular_mean_LN"][1]
        assert sure["difference"] == pytest.approx(row[other] - row[start])


@pytest.mark.parametrize(("number", "metric"), [(6, "best"), (7, "perplexity")])
def test_a_target_that_removes_no_block_compares_nothing(root: Path, number: int, metric: str) -> None:
    depth = {"metric": metric, "remove_blocks": "target"}
    folder, result = _measured(root, depth, number, width={"mlp": "target"}, target={"parameters": 0.98})
    assert list(result.summary["plan"]["keep_blocks"]) == list(range(NUM_BLOCKS))
    assert not {"candidates", "stability"} & result.summary.keys()
    assert not (folder / files.SET_LOSSES).exists()
    assert not (folder / files.DROP_LOSSES).exists()
