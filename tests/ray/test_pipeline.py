"""The whole path on real Ray with a tiny random teacher: what runs, what is reused, what survives."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.loading import load_model
from sdft_ray.pipeline.compress import compress
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.tiny import SPECIAL_TOKENS
from tests.support.worlds import ONE_WORKER, RESOURCES, make_world, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows many ends, so that some of its samples finish."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    ends = {"eos_token_id": list(range(len(SPECIAL_TOKENS)))}
    (folder / "teacher/generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return folder


def _recipe(folder: Path, **changes: object) -> Recipe:
    return Recipe.parse(world_data(folder, **changes))


@pytest.fixture(scope="module")
def first(folder: Path) -> Run:
    """A complete run, made once; its trainings are tracked."""
    tracked = RESOURCES.train.model_copy(update={"tracking": ("tensorboard",)})
    resources = RESOURCES.model_copy(update={"train": tracked})
    return compress(_recipe(folder), str(folder / "store"), resources, name="first", view="none")


def _made(run: Run) -> set[str]:
    return {stage["name"] for stage in run.stages() if not stage["skipped"]}


def _again(folder: Path, name: str, resources: Resources = RESOURCES, **changes: object) -> Run:
    return compress(_recipe(folder, **changes), str(folder / "store"), resources, name=name, view="none")


def test_everything_is_made_and_says_so(first: Run) -> None:
    data = first.to_json()
    assert _made(first) == {stage["name"] for stage in data["stages"]}
    assert set(data["scores"]) == {"teacher", "pruned", "sft", "sdft"}
    assert data["scores"]["sft"]["tiny_task"]["n"] == 8
    assert set(data["recovery"]) == {"sft", "sdft"}
    assert data["gap"]["num_kept"] == first.manifests["select"].summary["kept_distilled"]
    assert data["gap"]["verdict"]
    assert set(data["gap"]["nll"]) == set(data["gap"]["gaps"]) == {"teacher", "pruned"}
    assert data["sizes"]["pruned"]["num_blocks"] == 3
    assert all(stage["wall_s"] > 0 and stage["peak_rss_bytes"] > 0 for stage in data["stages"])
    assert json.loads(json.dumps(data)) == data


def test_the_students_are_plain_checkpoints_of_the_pruned_shape(first: Run) -> None:
    pruned = load_model(first.store.path(first.manifests["prune"].address), "float32")
    for arm in ("sft", "sdft"):
        student = load_model(first.student_path(arm), "float32")
        assert student.config.num_hidden_layers == 3
        states = zip(student.state_dict().values(), pruned.state_dict().values(), strict=True)
        assert any(not torch.equal(a, b) for a, b in states), "training changed nothing"


def test_training_says_what_it_cost_and_is_tracked(folder: Path, first: Run) -> None:
    for arm in ("sft", "sdft"):
        manifest = first.manifests[f"train:{arm}"]
        records = (first.student_path(arm) / files.HISTORY).read_text(encoding="utf-8").splitlines()
        assert all(json.loads(record)[name] > 0 for record in records for name in ("tokens_per_s", "mfu"))
        assert all(json.loads(record)["peak_memory_bytes"] > 50 * 2**20 for record in records)
        run_name = f"{arm}-{manifest.address.partition('/')[2][:8]}"
        (events,) = (folder / "store/tracking/tiny" / run_name).iterdir()
        assert b"tokens_per_s" in events.read_bytes()
        assert manifest.summary["notes"] == []
    assert "of the devices’ peak (MFU)" in first.report_path.read_text(encoding="utf-8")


def test_every_seed_row_is_generated_and_selected_once(first: Run) -> None:
    store = first.store
    seed = pq.read_table(store.path(first.manifests["seed"].address) / "rows.parquet")
    for step, file in (("generate", "generated.parquet"), ("select", "distilled.parquet")):
        table = pq.read_table(store.path(first.manifests[step].address) / file)
        assert sorted(table["example_id"].to_pylist()) == sorted(seed["example_id"].to_pylist())


def test_the_report_stands_alone(first: Run) -> None:
    """Nothing is fetched, and it has every model's score and the recipe of this run."""
    page = first.report_path.read_text(encoding="utf-8")
    assert "<html" in page
    assert re.findall(r"""\b(?:href|src)=["'](?!data:|#)[^"']*""", page) == []
    assert "https://" not in page.replace("https://arxiv.org", "")
    for model, scores in first.to_json()["scores"].items():
        assert f">{model}<" in page
        assert re.search(rf">{100 * scores['tiny_task']['value']:.1f}\b", page)
    assert Path(str(first.recipe.seed_set.source)).name in page


def test_a_second_run_executes_nothing(folder: Path, first: Run) -> None:
    assert _made(_again(folder, "second")) == set()


def test_a_changed_depth_does_not_regenerate(folder: Path, first: Run) -> None:
    made = _made(_again(folder, "deeper", Resources.model_validate(ONE_WORKER), depth={"remove_blocks": 2}))
    assert made.isdisjoint({"seed", "calibration", "measure", "generate", "select", "gap", "evaluate:teacher"})
    assert made >= {"plan", "prune", "gap:pruned", "train:sft", "train:sdft", "evaluate:pruned"}


def test_two_metrics_with_the_same_plan_share_the_student(folder: Path, first: Run) -> None:
    removed = [b for b in range(4) if b not in first.manifests["plan"].summary["plan"]["keep_blocks"]]
    made = _made(_again(folder, "by hand", depth={"metric": "explicit", "blocks": removed}))
    assert made == {"plan", "report"}


def test_a_step_without_a_manifest_runs_again(folder: Path, first: Run) -> None:
    """What a kill between the files and the manifest leaves behind is no artifact."""
    copy = folder / "copy"
    shutil.copytree(folder / "store", copy)
    killed = Store(str(copy))
    (copy / first.manifests["prune"].address / MANIFEST).unlink()
    run = compress(_recipe(folder), killed, RESOURCES, name="first", view="none")
    assert _made(run) == {"prune"}
    assert killed.damaged_files(first.manifests["prune"].address) == []


def test_a_damaged_input_is_named_and_the_other_stages_finish(folder: Path, first: Run) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "store", broken)
    store = Store(str(broken))
    address = first.manifests["evaluate:sft"].address
    shutil.rmtree(broken / address)
    weights = broken / first.manifests["train:sft"].address / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    size = weights.stat().st_size
    message = f"{weights} is truncated: {size} of {size + 10} bytes"
    with pytest.raises(ModelError, match=re.escape(message)):
        compress(_recipe(folder), store, RESOURCES, name="first", view="none")
    assert store.damaged_files(first.manifests["train:sft"].address) == ["model.safetensors"]
    assert store.manifest(first.manifests["evaluate:sdft"].address) is not None


def test_distilled_from_the_teacher_and_merged(folder: Path, first: Run) -> None:
    """Arms with a teacher beside them, on two workers, and points between their students; what was made is kept."""
    train = world_data(folder)["train"]
    learning_rate = 1e-3
    objectives = {
        "kd": {"cross_entropy": 0.0, "forward_kl": 1.0},
        "matched": {"cross_entropy": 0.5, "jensen_shannon": 1.0, "hidden_cosine": 1.0, "hidden_mse": 0.1},
    }
    arms = {
        name: {"data": "reference", "learning_rate": learning_rate, "objective": objective}
        for name, objective in objectives.items()
    }
    merges = {"both": {"arms": ("kd", "sft")}, "grid": {"arms": ("sft", "kd"), "kind": "linear", "t": (0.0, 0.25)}}
    run = _again(folder, "distilled", train={**train, "arms": {**train["arms"], **arms}}, merges=merges)
    students = {"kd", "matched", "both", "grid_0", "grid_25"}
    trained = {"train:kd", "train:matched", "merge:both", "merge:grid_0", "merge:grid_25"}
    assert _made(run) == trained | {f"evaluate:{name}" for name in students} | {"report"}
    assert set(run.to_json()["recovery"]) == students | {"sft", "sdft"}
    for name, objective in objectives.items():
        text = (run.student_path(name) / files.HISTORY).read_text(encoding="utf-8")
        for record in map(json.loads, text.splitlines()):
            assert set(record["terms"]) == {term for term, weight in objective.items() if weight}
            assert record["loss"] == pytest.approx(sum(objective[t] * value for t, value in record["terms"].items()))
    states = {
        name: load_model(run.student_path(name), "float32").state_dict() for name in ("sft", "kd", "both", "grid_0")
    }
    assert all(torch.equal(states["grid_0"][name], value) for name, value in states["sft"].items())
    assert any(not torch.equal(states["both"][name], value) for name, value in states["sft"].items())
    assert any(not torch.equal(states["kd"][name], value) for name, value in states["sft"].items())
    page = run.report_path.read_text(encoding="utf-8")
    assert "by forward KL" in page
    assert "slerp of kd and sft at 0.5" in page


def test_trained_on_what_generation_kept_of_the_teacher(folder: Path) -> None:
    """Signals of the transformers sampler, on two workers; some rows have none."""
    rows = [{"instruction": f"say {i}", "reference": f"it is {i}"} for i in range(8)]
    (folder / "sayings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objectives: dict[str, dict[str, Any]] = {
        "top": {"cross_entropy": 0.0, "top_k_kl": 1.0},
        "whole": {"cross_entropy": 0.5, "forward_kl": 1.0, "teacher_logits": "cached"},
    }
    arms = {
        name: {"data": "distilled", "learning_rate": 1e-3, "objective": objective}
        for name, objective in objectives.items()
    }
    changes = {
        "seed_set": {"source": str(folder / "sayings.jsonl")},
        "generate": {"max_tokens": 24, "temperature": 1.0, "top_logprobs": 16, "hidden_states": True},
        "train": {**world_data(folder)["train"], "arms": arms},
    }
    run = _again(folder, "cached", **changes)
    kept = run.manifests["select"].summary["kept_distilled"]
    assert 0 < kept < 8
    for name, objective in objectives.items():
        counts = run.manifests[f"train:{name}"].summary["signals"]
        assert counts["num_rows"] + sum(counts["without"].values()) == 8
        assert counts["num_rows"] == kept
        assert counts["num_left_out"] == (8 - kept if name == "top" else 0)
        text = (run.student_path(name) / files.HISTORY).read_text(encoding="utf-8")
        for record in map(json.loads, text.splitlines()):
            weights = {term: weight for term, weight in objective.items() if term != "teacher_logits" and weight}
            assert record["terms"].keys() == weights.keys()
            assert record["loss"] == pytest.approx(sum(weights[t] * value for t, value in record["terms"].items()))
            assert all(value > 0 for value in record["terms"].values())
    assert "by top-k KL from cached signals" in run.report_path.read_text(encoding="utf-8")
