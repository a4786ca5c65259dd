"""A grid with a rate that diverges, a corrected teacher, and an arm that is also a trial: on real Ray."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.held_out import is_held_out
from sdft_ray.data.packing import pack
from sdft_ray.errors import DivergenceError
from sdft_ray.models.loading import load_model
from sdft_ray.pipeline.compress import compress
from sdft_ray.pipeline.run import Run
from sdft_ray.progress import parse_event
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.store import files
from sdft_ray.training.loop import mean_loss
from tests.support.worlds import ONE_WORKER, world_data

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(900),  # four trainings
]

RESOURCES = Resources.model_validate({**ONE_WORKER, "generate": {"sampler": "scripted", "cpus": 0.5}})
HELD_OUT = 0.4
KD = {"data": "reference", "objective": {"cross_entropy": 0.5, "forward_kl": 1.0}}
GRID = {**KD, "learning_rate": (1e-3, 4e-3, 1e30)}
FIXED = {**KD, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(world: Path) -> Path:
    """Every rewrite of the scripted sampler is kept, since responses are not checked."""
    return world


def recipe(folder: Path, arms: dict[str, Any]) -> Recipe:
    data = world_data(folder)
    correction = {"data": "reference", "learning_rate": 3e-3, "num_steps": 4}
    return Recipe.parse(
        {
            **data,
            "seed_set": {"source": str(folder / "unchecked.jsonl")},
            "train": {**data["train"], "num_steps": 4, "validation_fraction": HELD_OUT, "arms": arms},
            "teacher_correction": correction,
        }
    )


def made(run: Run) -> set[str]:
    return {stage["name"] for stage in run.stages() if not stage["skipped"]}


@pytest.fixture(scope="module")
def events() -> list[str]:
    return []


@pytest.fixture(scope="module")
def grid(folder: Path, events: list[str]) -> Run:
    """Made once; `events` holds what was started and finished, in order."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run = compress(
            recipe(folder, {"kd": GRID, "fixed": FIXED}), str(folder / "store"), RESOURCES, name="grid", view="json"
        )
    found = [event for line in said.getvalue().splitlines() if (event := parse_event(line))]
    events += [f"{event.event} {event.stage}" for event in found if event.event != "progress"]
    return run


def test_trials_run_side_by_side_and_shared_work_is_done_once(grid: Run, events: list[str]) -> None:
    started = [events.index(f"stage_started train:kd@{rate}") for rate in ("0.001", "0.004", "1e+30")]
    finished = [events.index(f"stage_finished train:kd@{rate}") for rate in ("0.001", "0.004", "1e+30")]
    assert sorted(started)[1] < min(finished)
    assert "stage_skipped train:fixed" in events
    assert grid.manifests["train:fixed"].address == grid.manifests["train:kd@0.001"].address


def test_a_diverging_trial_is_lost_and_the_best_of_the_others_is_the_student(grid: Run) -> None:
    lost = grid.manifests["train:kd@1e+30"]
    assert "training diverged at step" in lost.summary["diverged"]
    assert set(lost.files) == {files.HISTORY}
    losses = {rate: grid.manifests[f"train:kd@{rate}"].summary["held_out_loss"] for rate in ("0.001", "0.004")}
    best = min(losses, key=lambda rate: losses[rate])
    assert grid.student_path("kd") == grid.store.path(grid.manifests[f"train:kd@{best}"].address)
    assert grid.manifests["evaluate:kd"].inputs["model"] == grid.manifests[f"train:kd@{best}"].address
    assert grid.store.damaged_files(grid.manifests["choose:kd"].address) == []


def test_held_out_rows_are_what_the_loss_is_of_and_are_not_trained_on(folder: Path, grid: Run) -> None:
    manifest = grid.manifests["train:kd@0.001"]
    table = pq.read_table(grid.store.path(grid.manifests["seed"].address) / files.ROWS).to_pylist()
    held = [row for row in table if is_held_out(row["example_id"], HELD_OUT)]
    assert 0 < len(held) < len(table)
    student = grid.store.path(manifest.address)
    chat = ChatFormat(load_tokenizer(student))
    documents = [chat.encode(row["instruction"], row["reference_response"]) for row in held]
    expected = mean_loss(load_model(student, "float32"), pack(documents, 128))
    assert manifest.summary["held_out_loss"] == pytest.approx(expected, rel=1e-4)
    assert manifest.summary["num_held_out_rows"] == len(held)
    assert manifest.summary["num_held_out_tokens"] == sum(sum(document.loss_mask) for document in documents)
    trained = [chat.encode(row["instruction"], row["reference_response"]) for row in table if row not in held]
    assert manifest.summary["num_rows"] == pack(trained, 128).num_rows


def test_the_teacher_is_corrected_measured_and_taken(folder: Path, grid: Run) -> None:
    corrected = load_model(grid.store.path(grid.manifests["correct:teacher"].address), "float32")
    original = load_model(folder / "teacher", "float32")
    assert corrected.config.num_hidden_layers == original.config.num_hidden_layers == 4
    moved = zip(corrected.state_dict().values(), original.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    correction = grid.to_json()["correction"]
    table = pq.read_table(grid.store.path(grid.manifests["select"].address) / files.DISTILLED).to_pylist()
    held = [row for row in table if is_held_out(row["example_id"], HELD_OUT) and row["source"] == "distilled"]
    assert correction["num_rows"] == len(held) > 1
    chat = ChatFormat(load_tokenizer(folder / "teacher"))
    for text, column in (("reference", "reference_response"), ("distilled", "response")):
        packed = pack([chat.encode(row["instruction"], row[column]) for row in held], 128)
        for name, model in (("teacher", original), ("corrected", corrected)):
            assert correction["nll"][name][text]["value"] == pytest.approx(mean_loss(model, packed), rel=1e-4)
        change = correction["nll"]["corrected"][text]["value"] - correction["nll"]["teacher"][text]["value"]
        assert correction["changes"][text]["value"] == pytest.approx(change, abs=1e-6)
    assert correction["changes"]["reference"]["value"] < 0, "tuned on references, it comes nearer to unseen ones"


def test_the_report_tells_trials_and_correction(grid: Run) -> None:
    page = grid.report_path.read_text(encoding="utf-8")
    for said in (
        "How learning rates were chosen",
        "diverged",
        "chosen",
        "The teacher’s correction",
        "best of 3 trials",
    ):
        assert said in page
    assert len(grid.to_json()["grids"]["kd"]["trials"]) == 3
    assert set(grid.to_json()["recovery"]) == {"kd", "fixed"}


def test_again_nothing_is_made(folder: Path, grid: Run) -> None:
    again = compress(
        recipe(folder, {"kd": GRID, "fixed": FIXED}), str(folder / "store"), RESOURCES, name="again", view="none"
    )
    assert made(again) == set()
    assert again.student_path("kd") == grid.student_path("kd")


def test_the_chosen_rate_alone_shares_all_work(folder: Path, grid: Run) -> None:
    best = next(trial["learning_rate"] for trial in grid.to_json()["grids"]["kd"]["trials"] if trial["chosen"])
    alone = recipe(folder, {"best": {**KD, "learning_rate": best}})
    run = compress(alone, str(folder / "store"), RESOURCES, name="alone", view="none")
    assert made(run) == {"report"}
    assert run.student_path("best") == grid.student_path("kd")


def test_a_lost_rate_alone_is_refused_before_anything_runs(folder: Path, grid: Run) -> None:
    alone = recipe(folder, {"lost": {**KD, "learning_rate": 1e30}})
    with pytest.raises(DivergenceError, match="train:lost: training diverged"):
        compress(alone, str(folder / "store"), RESOURCES, name="lost", view="none")
    assert "lost" not in grid.store.runs()


def test_when_all_diverge_the_run_says_so(folder: Path, grid: Run) -> None:
    """One of them is known from the grid."""
    hopeless = recipe(folder, {"kd": {**KD, "learning_rate": (1e29, 1e30)}})
    with pytest.raises(DivergenceError, match=r"all 2 trials diverged.*give lower learning rates"):
        compress(hopeless, str(folder / "store"), RESOURCES, name="hopeless", view="none")
    assert "hopeless" not in grid.store.runs()
