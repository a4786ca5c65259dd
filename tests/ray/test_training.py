"""Recovery training on real Ray: whoever dies, and whatever becomes of a checkpoint, the same student comes out.

Runs share the Ray of this process, but for those that a test kills with all of their Ray or that need nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from sdft_ray.errors import DivergenceError
from sdft_ray.stages import checkpoints, train
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files
from sdft_ray.training.plan import StepRecord
from tests.support.fork_server import ForkServer
from tests.support.limited_memory import Limit, LimitedJob, Told, make_cgroup
from tests.support.processes import ray_processes
from tests.support.training_job import ADDRESS, history, light, training_job, weights

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("local_ray")]

ROOT = Path(__file__).parents[2]
LONG = {"num_steps": 160}
"""Long enough to be killed in: a step takes some 20 ms."""
GENTLE: dict[str, Any] = {"arms": {"sft": {"data": "reference", "learning_rate": 1e-5}}}
"""A learning rate at which any number of workers ends alike."""


def finish(folder: Path, resources: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Run to the end; the step's summary."""
    return train.run(training_job(folder, light(**resources), **changes)).summary


@contextmanager
def in_thread(function: Callable[..., Any], *arguments: Any) -> Iterator[Future[Any]]:
    """The block may look at the run and disturb it; at its end the run has ended, and its error is raised."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(function, *arguments)
        yield running
        running.result()


@contextmanager
def own_process(folder: Path, forks: ForkServer, changes: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The step with a Ray of its own, in a process of its own; all of it has ended at the end of the block."""
    command = [sys.executable, "-m", "tests.support.training_job", str(folder), "{}", json.dumps(changes)]
    home = folder / "home"
    home.mkdir()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**forks.environment(), "HOME": str(home)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)
        process.wait()


def kill_all(process: subprocess.Popen[str]) -> None:
    """Driver, Ray and workers, at one blow. Workers are forks of the fork server, which outlive their stubs a while."""
    if process.poll() is not None:
        return
    driver = psutil.Process(process.pid)
    workers = [*ray_processes("RayTrainWorker"), *ray_processes("TrainController")]
    members = [driver, *driver.children(recursive=True), *workers]
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    end = time.monotonic() + 30
    while any(map(_is_alive, members)) and time.monotonic() < end:
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    """One that has ended, and whose parent has not asked for its exit status, is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that Ray has on its list, oldest first."""
    run = folder / "store/work" / ADDRESS / checkpoints.RUN_NAME
    try:
        snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (OSError, ValueError):
        return []
    return [run / result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]]


def wait_for_checkpoints(folder: Path, number: int, is_running: Callable[[], bool]) -> list[Path]:
    end = time.monotonic() + 300
    while len(whole := whole_checkpoints(folder)) < number:
        assert is_running(), "the run ended without a checkpoint"
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)
    return whole


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    folder = tmp_path_factory.mktemp("undisturbed")
    summary = finish(folder, {}, LONG)
    assert (summary["num_workers"], summary["notes"]) == (2, [])
    job = training_job(folder, light(), **LONG)
    assert [record["step"] for record in history(job)] == list(range(1, 161))
    return job


def assert_same_run(folder: Path, undisturbed: StageContext) -> None:
    """Every step once, every loss and every weight to the bit."""
    job = training_job(folder, light(), **LONG)
    curve = [(record["step"], record["loss"], record["grad_norm"]) for record in history(job)]
    assert curve == [(record["step"], record["loss"], record["grad_norm"]) for record in history(undisturbed)]
    assert weights(job) == weights(undisturbed)


def test_a_killed_worker_changes_nothing(tmp_path: Path, undisturbed: StageContext) -> None:
    """Its checkpoints come by time alone: the run has fewer steps than `checkpoint_every`."""
    by_time = {"checkpoint_every": 1000, "checkpoint_every_s": 0.3}
    with in_thread(finish, tmp_path, by_time, LONG) as running:
        wait_for_checkpoints(tmp_path, 1, lambda: not running.done())
        _workers()[1].kill()
    assert_same_run(tmp_path, undisturbed)


def test_a_killed_worker_of_a_sharded_run_costs_nothing(tmp_path: Path) -> None:
    """Every worker has a part of the state; what comes out is what one process alone makes of the same rows."""
    gentle = {**LONG, **GENTLE}
    with in_thread(finish, tmp_path, {"strategy": "fsdp", "keep_checkpoints": 50}, gentle) as running:
        newest = wait_for_checkpoints(tmp_path, 1, lambda: not running.done())[-1]
        pieces = {path.name for path in newest.iterdir()} - {files.HISTORY}
        _workers()[1].kill()
    assert pieces == {f"state-0000{rank}-of-00002.{kind}" for rank in (1, 2) for kind in ("json", "safetensors")}
    assert_like_one_process(training_job(tmp_path, light(), **gentle))


def _workers() -> list[psutil.Process]:
    workers = ray_processes("RayTrainWorker")
    assert len(workers) == 2
    return workers


def assert_like_one_process(job: StageContext) -> None:
    records, alone = history(job), _alone(job)
    assert [record["step"] for record in records] == [record.step for record in alone]
    assert [record["loss"] for record in records] == pytest.approx([record.loss for record in alone], abs=1e-5)


@pytest.mark.parametrize(
    "damage",
    ["bit", pytest.param("history", marks=pytest.mark.nightly), pytest.param("list", marks=pytest.mark.nightly)],
)
def test_a_killed_driver_and_a_damaged_checkpoint_change_nothing(
    damage: str, tmp_path: Path, forks: ForkServer, undisturbed: StageContext
) -> None:
    """What a damage looks like to the function that reads: tests/unit/stages/test_checkpoints.py."""
    with own_process(tmp_path, forks, LONG) as process:
        wait_for_checkpoints(tmp_path, 2, lambda: process.poll() is None)
        kill_all(process)
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
    summary = finish(tmp_path, {}, LONG)
    if damage != "list":
        assert any(newest.name in note for note in summary["notes"])
    assert_same_run(tmp_path, undisturbed)


def test_a_run_goes_on_with_fewer_workers(tmp_path: Path) -> None:
    """One of two is lost and nobody replaces it: what comes out is what one process alone makes of the rows."""
    gentle = {**LONG, **GENTLE}
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(finish, tmp_path, {"max_failures": 0}, gentle)
        wait_for_checkpoints(tmp_path, 1, lambda: not running.done())
        _workers()[1].kill()
    assert running.exception() is not None
    assert finish(tmp_path, {"num_workers": 1}, gentle)["num_workers"] == 1
    assert_like_one_process(training_job(tmp_path, light(), **gentle))


WIDE: dict[str, Any] = {"num_steps": 4, "global_batch_size": 16, "max_seq_len": 1024, **GENTLE}
"""Micro-batches that take some 400 MB at a width of 128."""


@pytest.mark.parametrize("limit", ["address space", pytest.param("cgroup", marks=pytest.mark.nightly)])
def test_a_run_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(limit: Limit, tmp_path: Path) -> None:
    """A worker is killed, which costs one of `max_failures`; the next have little memory, and none is left for that.

    One process with all the memory it wants gives the same losses up to rounding.
    """
    resources = light(num_workers=1, micro_batch_size=16, checkpoint_every=1, max_failures=1)
    plain = training_job(tmp_path, resources, hidden=128, **WIDE)
    switch, told, room_bytes = tmp_path / "switch", tmp_path / "told", 250 * 2**20
    as_plain: dict[str, Any] = {field.name: getattr(plain, field.name) for field in fields(plain)}
    as_plain["progress"] = Told(str(told))
    limited = LimitedJob(**as_plain, switch=str(switch), room_bytes=room_bytes, limit=limit)
    with limits(limit, switch, room_bytes):
        with in_thread(train.run, limited) as running:
            wait_for_checkpoints(tmp_path, 1, lambda: not running.done())
            switch.touch()
            [worker] = ray_processes("RayTrainWorker")
            worker.kill()
        notes = running.result().summary["notes"]
    assert notes[0] == "ran out of memory with micro-batches of 16 rows and went on with 8"
    first, *_ = told.read_text().splitlines()
    assert first == (
        "train:sft ran out of memory with micro-batches of 16 rows: it goes on from its last checkpoint with 8"
    )
    assert_like_one_process(plain)


@contextmanager
def limits(limit: Limit, switch: Path, room_bytes: int) -> Iterator[None]:
    """What the limit needs outside of the workers."""
    if limit == "address space":
        yield
        return
    try:
        group = make_cgroup(switch, room_bytes)
    except OSError as reason:
        pytest.skip(f"a memory limit needs the right to make a cgroup: {reason}")
    try:
        yield
    finally:
        group.rmdir()


def new_checkpoints(folder: Path, is_running: Callable[[], bool]) -> Iterator[int]:
    """How many workers there are, each time that a checkpoint has come."""
    newest: list[Path] = []
    while is_running():
        time.sleep(0.1)
        last = whole_checkpoints(folder)[-1:]
        if not last or last == newest:
            continue
        newest = last
        if num_workers := len(ray_processes("RayTrainWorker")):  # the group of the last checkpoint may have gone
            yield num_workers


@pytest.mark.nightly
def test_workers_come_and_go_with_their_nodes(tmp_path: Path) -> None:
    """In a process of its own: Ray's test cluster leaves its mark on the one that it runs in."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        sizes = executor.submit(_lose_and_gain_a_node, tmp_path).result(timeout=900)
    assert [size for size, _ in groupby(sizes)] == [2, 1, 2], sizes
    assert_like_one_process(training_job(tmp_path, light(), **PATIENT))


PATIENT: dict[str, Any] = {"num_steps": 1500, **GENTLE}


def _lose_and_gain_a_node(folder: Path) -> list[int]:
    """Train on two nodes of one CPU each, kill one, and bring another; the number of workers at each checkpoint.

    What counts is who trained, so the next thing happens only when two checkpoints have come: a worker that is left
    over from a group, or one that still starts, writes none.
    """
    from tests.support.nodes import Cluster

    home = folder / "home"
    home.mkdir()
    os.environ |= {"HOME": str(home), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    resources = light(cpus=1.0, num_workers=(1, 2), resize_every_s=1.0, checkpoint_every=50)
    job = training_job(folder, resources, **PATIENT)
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    sizes: list[int] = []
    try:
        lost = cluster.add_node(**node)
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        with in_thread(train.run, job) as running:
            is_replaced = False
            for num_workers in new_checkpoints(folder, lambda: not running.done()):
                sizes.append(num_workers)
                if lost is not None and sizes[-2:] == [2, 2]:
                    cluster.remove_node(lost, allow_graceful=False)
                    lost = None
                elif lost is None and not is_replaced and sizes[-2:] == [1, 1]:
                    cluster.add_node(**node)
                    is_replaced = True
    finally:
        ray.shutdown()
        cluster.shutdown()
    return sizes


def _alone(job: StageContext) -> list[StepRecord]:
    """The same training by the plain loop, without Ray."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.stages.training_rows import training_rows
    from sdft_ray.stages.views import train_view
    from sdft_ray.training.loop import train as plain_train
    from sdft_ray.training.plan import arm_plan

    rows = training_rows(job).rows
    records: list[StepRecord] = []
    plan = arm_plan(train_view(job.step), job.step.label, job.resources.train, rows.num_rows)
    plain_train(load_model(job.input("pruned"), "float32"), rows, plan, report=records.append)
    return records


def test_divergence_ends_the_run_at_once_and_names_rows(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"training diverged at step \d+: .* which hold row-"):
        finish(tmp_path, {}, {"arms": {"sft": {"data": "reference", "learning_rate": 1e30}}})
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
        with ThreadPoolExecutor(1) as thread:
            by_time = {"checkpoint_every": 1000, "checkpoint_every_s": 0.1}
            running = thread.submit(finish, disk, {"keep_checkpoints": 1, "max_failures": 0, **by_time}, {})
        if error := running.exception():
            assert "No space left on device" in "".join(traceback.format_exception(error))
            filler.unlink()
            finish(disk, {}, {})
        else:
            notes = running.result()["notes"]
            assert any("no disk space for the checkpoint of step" in note for note in notes), notes
            assert all("free some space" in note for note in notes)
        assert [record["step"] for record in history(job)] == list(range(1, 41))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
