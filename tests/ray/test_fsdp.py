"""Sharded training as a stage on real Ray: the same student as with whole copies, also after a worker has died."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import torch

from sdft_ray.models.loading import load_model
from sdft_ray.pipeline import compress
from sdft_ray.recipe import Recipe
from sdft_ray.resources import Resources
from sdft_ray.run import Run
from sdft_ray.stages import files
from sdft_ray.store.store import MANIFEST, Store
from sdft_ray.training.state import load_state
from tests.worlds import LIGHT, RESOURCES, make_world, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("local_ray")]
NUM_STEPS = 12
SHARDED = Resources.model_validate({**LIGHT, "train": {**LIGHT["train"], "strategy": "fsdp"}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    train = world_data(folder)["train"]
    return Recipe.parse(
        world_data(folder, train={**train, "num_steps": NUM_STEPS, "arms": {"sft": train["arms"]["sft"]}})
    )


@pytest.fixture(scope="module")
def copies(folder: Path, recipe: Recipe) -> Run:
    """The same recipe with a whole model in every worker."""
    return compress(recipe, str(folder / "store"), RESOURCES, name="run", view="none")


def _history(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / files.HISTORY).read_text(encoding="utf-8").splitlines()]


def _kill_a_worker(work: Path, over: Event) -> list[dict[str, Any]]:
    """Wait for a checkpoint with the files of both ranks, end one of them, and tell the history in the checkpoint."""
    while not over.wait(0.02):
        for index in sorted(work.glob("attempts/checkpoint_*/state-00002-of-00002.json")):
            checkpoint = index.parent
            workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name() + _line(p)]
            if not (checkpoint / files.HISTORY).exists() or not workers:
                continue
            time.sleep(1)  # Ray notes a checkpoint once both ranks have reported it
            if not checkpoint.exists():
                continue
            history, state = _history(checkpoint), load_state(checkpoint)
            assert state.step == len(history)
            workers[-1].kill()
            return history
    return []


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_worker_dies_and_the_shards_make_the_same_student(folder: Path, recipe: Recipe, copies: Run) -> None:
    shutil.copytree(folder / "store", folder / "sharded")
    store = Store(str(folder / "sharded"))
    address = copies.manifests["train:sft"].address
    shutil.rmtree(folder / "sharded" / address)
    over = Event()
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(_kill_a_worker, store.work(address), over)
        try:
            run = compress(recipe, store, SHARDED, name="run", view="none")
        finally:
            over.set()
        before = killed.result()
    assert {stage["name"] for stage in run.stages() if not stage["skipped"]} == {"train:sft"}
    found, expected = _history(run.student_path("sft")), _history(copies.student_path("sft"))
    assert [record["step"] for record in found] == list(range(1, NUM_STEPS + 1))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    assert 0 < len(before) < NUM_STEPS
    assert found[: len(before)] == before, "training went on from the checkpoint, not from the start"
    sharded, whole = (load_model(one.student_path("sft"), "float32").state_dict() for one in (run, copies))
    assert (folder / "sharded" / address / MANIFEST).exists()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-4)
