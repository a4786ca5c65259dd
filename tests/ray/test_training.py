"""Recovery training on real Ray: whoever dies, and whatever becomes of a checkpoint, the same student comes out.

Each run has a Ray of its own, in a process of its own, so that all of it can be killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdft_ray.stages import checkpoints, train
from sdft_ray.stages.job import Job
from sdft_ray.store import files
from sdft_ray.training.plan import StepRecord
from tests.support.processes import ray_processes
from tests.support.training_job import ADDRESS, history, light, training_job, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SLOW = {"num_steps": 160}
"""Long enough to be killed in: a step takes some 20 ms."""


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@contextmanager
def running(folder: Path, resources: dict[str, Any], train: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The step in a process of its own, with all that it starts ended at the end."""
    command = [
        sys.executable,
        "-m",
        "tests.support.training_job",
        str(folder),
        json.dumps(resources),
        json.dumps(train),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            family = _family(process)
            process.kill()
        process.wait()
        for member in family:
            _kill(member)


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(10)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass


def finish(folder: Path, resources: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """Run to the end; the step's summary."""
    with running(folder, resources, train) as process:
        out, err = process.communicate(timeout=480)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that Ray has on its list, oldest first."""
    run = folder / "store/work" / ADDRESS / checkpoints.RUN_NAME
    try:
        told = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (OSError, ValueError):
        return []
    return [run / result["checkpoint_dir_name"] for result in told["checkpoint_results"]]


def wait_for_checkpoints(folder: Path, process: subprocess.Popen[str], number: int) -> list[Path]:
    end = time.monotonic() + 300
    while len(found := whole_checkpoints(folder)) < number:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("undisturbed")
    summary = finish(folder, {}, SLOW)
    assert (summary["num_workers"], summary["notes"]) == (2, [])
    job = training_job(folder, light(), **SLOW)
    assert [record["step"] for record in history(job)] == list(range(1, 161))
    return job


def assert_same_run(folder: Path, undisturbed: Job) -> None:
    """Every step once, every loss and every weight to the bit."""
    job = training_job(folder, light(), **SLOW)
    curve = [(record["step"], record["loss"], record["grad_norm"]) for record in history(job)]
    assert curve == [(record["step"], record["loss"], record["grad_norm"]) for record in history(undisturbed)]
    assert weights(job) == weights(undisturbed)


def test_a_killed_worker_changes_nothing(tmp_path: Path, undisturbed: Job) -> None:
    with running(tmp_path, {}, SLOW) as process:
        wait_for_checkpoints(tmp_path, process, 1)
        _workers(process)[1].kill()
        _, err = process.communicate(timeout=480)
    assert process.returncode == 0, err[-3000:]
    assert_same_run(tmp_path, undisturbed)


def test_a_killed_worker_of_a_sharded_run_costs_nothing(tmp_path: Path) -> None:
    """Every worker has a part of the state; what comes out is what one process alone makes of the same rows."""
    gentle = {**SLOW, "arms": {"sft": {"data": "reference", "learning_rate": 1e-5}}}
    with running(tmp_path, {"strategy": "fsdp", "keep_checkpoints": 50}, gentle) as process:
        newest = wait_for_checkpoints(tmp_path, process, 1)[-1]
        pieces = {path.name for path in newest.iterdir()} - {files.HISTORY}
        _workers(process)[1].kill()
        _, err = process.communicate(timeout=480)
    assert process.returncode == 0, err[-3000:]
    assert pieces == {f"state-0000{rank}-of-00002.{kind}" for rank in (1, 2) for kind in ("json", "safetensors")}
    assert_like_one_process(training_job(tmp_path, light(), **gentle))


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = ray_processes("RayTrainWorker", process.pid)
    assert len(found) == 2
    return found


def assert_like_one_process(job: Job) -> None:
    found, alone = history(job), _alone(job)
    assert [record["step"] for record in found] == [record.step for record in alone]
    assert [record["loss"] for record in found] == pytest.approx([record.loss for record in alone], abs=1e-5)


@pytest.mark.parametrize("damage", ["bit", "history", "list"])
def test_a_killed_driver_and_a_damaged_checkpoint_change_nothing(damage: str, tmp_path: Path, undisturbed: Job) -> None:
    with running(tmp_path, {}, SLOW) as process:
        wait_for_checkpoints(tmp_path, process, 2)
        for member in [psutil.Process(process.pid), *_family(process)]:
            _kill(member)
    run = tmp_path / "store/work" / ADDRESS / checkpoints.RUN_NAME
    newest = max(run.glob("checkpoint_2*"))  # which Ray may not have on its list yet
    if damage == "bit":
        tensors = newest / "state.safetensors"
        content = bytearray(tensors.read_bytes()) if tensors.exists() else bytearray(b"cut")
        content[len(content) // 2] ^= 4
        tensors.write_bytes(content)
    elif damage == "history":
        (newest / files.HISTORY).unlink(missing_ok=True)
    else:
        os.truncate(run / "checkpoint_manager_snapshot.json", 40)
    summary = finish(tmp_path, {}, SLOW)
    if damage != "list":
        assert any(newest.name in note for note in summary["notes"])
    assert_same_run(tmp_path, undisturbed)


def test_workers_come_and_go_with_their_nodes(tmp_path: Path) -> None:
    """In a process of its own: Ray's test cluster leaves its mark on the one that it runs in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        sizes = executor.submit(_lose_and_gain_a_node, tmp_path).result(timeout=900)
    assert [size for size, _ in groupby(sizes)] == [2, 1, 2], sizes
    assert_like_one_process(training_job(tmp_path, light(), **PATIENT))


PATIENT: dict[str, Any] = {
    "num_steps": 1500,
    "arms": {"sft": {"data": "reference", "learning_rate": 1e-5}},
}


def _lose_and_gain_a_node(folder: Path) -> list[int]:
    """Train on two nodes of one CPU each, kill one, and bring another; the number of workers at each checkpoint.

    What counts is who trained, so the next thing happens only when two checkpoints have come: a worker that is left
    over from a group, or one that still starts, writes none.
    """
    import ray

    from tests.support.nodes import Cluster

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    resources = light(cpus=1.0, num_workers=(1, 2), resize_every_s=1.0, checkpoint_every=50)
    job = training_job(folder, resources, **PATIENT)
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    sizes: list[int] = []
    try:
        lost = cluster.add_node(**node)
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        with ThreadPoolExecutor(1) as thread:
            run = thread.submit(train.run, job)
            newest: list[Path] = []
            is_replaced = False
            while not run.done():
                time.sleep(0.1)
                found = whole_checkpoints(folder)[-1:]
                if not found or found == newest:
                    continue
                newest, num_workers = found, len(ray_processes("RayTrainWorker"))
                if not num_workers:  # the group of the last checkpoint is gone already
                    continue
                sizes.append(num_workers)
                if lost is not None and sizes[-2:] == [2, 2]:
                    cluster.remove_node(lost, allow_graceful=False)
                    lost = None
                elif lost is None and not is_replaced and sizes[-2:] == [1, 1]:
                    cluster.add_node(**node)
                    is_replaced = True
            run.result()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return sizes


def _alone(job: Job) -> list[StepRecord]:
    """The same training by the plain loop, without Ray."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.stages.training_rows import training_rows
    from sdft_ray.training.loop import train as plain_train
    from sdft_ray.training.plan import arm_plan

    rows = training_rows(job).rows
    records: list[StepRecord] = []
    plan = arm_plan(job.recipe.train, job.arm, job.resources.train, rows.num_rows)
    plain_train(load_model(job.input("pruned"), "float32"), rows, plan, report=records.append)
    return records


def test_divergence_ends_the_run_at_once_and_names_rows(tmp_path: Path) -> None:
    arms = {"arms": {"sft": {"data": "reference", "learning_rate": 1e30}}}
    with running(tmp_path, {}, arms) as process:
        _, err = process.communicate(timeout=480)
    assert process.returncode != 0
    told = err[err.index("DivergenceError") :]
    assert "training diverged at step" in told
    assert "which hold row-" in told
    assert len(list((tmp_path / "store/work" / ADDRESS / checkpoints.RUN_NAME).glob("checkpoint_2*"))) <= 2


def test_a_full_disk_costs_checkpoints_not_the_run(tmp_path: Path) -> None:
    """A real small disk: room for the inputs, the student and one checkpoint or two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("making a small disk needs the right to mount one")
    try:
        job = training_job(disk, light())
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(free - 700_000))  # not enough for two checkpoints
        with running(disk, {"keep_checkpoints": 1, "max_failures": 0}, {}) as process:
            out, err = process.communicate(timeout=480)
        if process.returncode:
            assert "No space left on device" in err
            filler.unlink()
            finish(disk, {}, {})
        else:
            assert any("no room for the checkpoint" in note for note in json.loads(out.splitlines()[-1])["notes"])
        assert [record["step"] for record in history(job)] == list(range(1, 41))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
