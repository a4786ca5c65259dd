"""Workers that die on a real Ray: what the driver learns of it, and what a user reads."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from sdft_ray.errors import ResourceError, StageError
from sdft_ray.stages.board import Figure, ProgressBoard, ProgressReporter
from sdft_ray.stages.failures import Scene, as_ours
from tests.unit.stages.test_failures import CACHE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

STEP = "generate"


def _die(reporter: ProgressReporter, how: str) -> None:
    reporter.phase("loading the engine")
    ray.get(reporter._board.read.remote())  # the board knows of this process
    print("what a library says last", file=sys.stderr, flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.string_at(0)


class _WithoutRoom:
    """An engine as vLLM's is when its KV cache is too small."""

    def __init__(self) -> None:
        raise ValueError(CACHE.removeprefix("ValueError: "))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def _failed(work: Any, log: Path, board: Any = None) -> StageError | ResourceError:
    with pytest.raises(Exception) as failure:  # whatever Ray makes of it
        work()
    workers: Any = ray.get(board.workers.remote(STEP)) if board else ()
    error = as_ours(Scene(STEP, STEP, workers, log), failure.value)
    assert isinstance(error, StageError | ResourceError)
    return error


@pytest.mark.parametrize(("how", "cause"), [("killed", "was killed by SIGKILL"), ("crashed", "was killed by SIGSEGV")])
def test_a_worker_that_dies_is_named_with_its_last_line(tmp_path: Path, how: str, cause: str) -> None:
    board: Any = ProgressBoard.remote()
    task: Any = ray.remote(_die).options(max_retries=0)
    reporter = ProgressReporter(board, STEP)
    error = _failed(lambda: ray.get(task.remote(reporter, how)), tmp_path / "run.log", board)
    assert f"step generate failed: the process of its engine {cause}" in str(error)
    if how == "killed":
        assert "its last line: what a library says last" in str(error)
    assert "what a library says last" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_an_engine_of_ray_data_that_finds_no_room(tmp_path: Path) -> None:
    def work() -> None:
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        with DataContext.current(context):
            rows = ray.data.from_blocks([pa.table({"row": [1]})])
            pool = ActorPoolStrategy(min_size=1, max_size=1)
            rows.map_batches(_WithoutRoom, compute=pool, num_cpus=0.1, batch_format="pyarrow").materialize()

    error = _failed(work, tmp_path / "run.log")
    assert isinstance(error, ResourceError)
    assert "generate: a context of 8,192 tokens needs 0.35 GiB" in error.message


def test_workers_tell_parts_and_phases() -> None:
    board: Any = ProgressBoard.remote()
    reporter = ProgressReporter(board, "measure", interval_s=0.0)

    def work(reporter: ProgressReporter, part: str) -> None:
        reporter.phase("loading the model")
        reporter.part(part)(3, 10, "batches")

    ray.get([ray.remote(work).remote(reporter, part) for part in "ab"])  # type: ignore[call-arg]
    figure: Any = Figure(6, 20, "batches")
    deadline = time.monotonic() + 20
    while ray.get(board.read.remote()) != {"measure": figure} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.get(board.read.remote()) == {"measure": figure}
    workers: Any = ray.get(board.workers.remote("measure"))
    assert all(worker.path.endswith(".err") and worker.pid != os.getpid() for worker in workers)
