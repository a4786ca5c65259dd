"""What a user reads when a worker fails."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, UserCodeException, WorkerCrashedError
from ray.train import WorkerGroupError

from sdft_ray.errors import DataError, ResourceError, StageError
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.board import WorkerLog
from sdft_ray.stages.failures import _LESS_MEMORY, Scene, as_ours

CACHE = (
    "ValueError: To serve at least one request with the model's max seq len (8192), (0.35 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.25 GiB). Based on the available memory, the estimated "
    "maximum model length is 5824. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
    "backend) or decreasing `max_model_len` when initializing the engine."
)
ENGINE_LOG = f"""INFO 11-29 07:00:00 [core.py:10] loading
\x1b[36m(EngineCore pid=7)\x1b[0m ERROR 11-29 07:00:01 [core.py:99] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-29 07:00:01 [core.py:99]   File "core.py", line 3, in run
(EngineCore pid=7) ERROR 11-29 07:00:01 [core.py:99] {CACHE}
Traceback (most recent call last):
  File "llm.py", line 3
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""
CRASH = """hello
*** SIGILL received at time=1764400000 on cpu 1 ***
PC: @     0x7f0000000000  (unknown)  kernel
    @     0x7f0000000001  (unknown)
[2026-11-29 07:00:00,000 E 12 12] logging.cc:474: *** SIGILL received at time=1764400000 on cpu 1 ***
Fatal Python error: Illegal instruction

Stack (most recent call first):
  File "x.py", line 2 in <module>
"""


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene("generate", "generate", (), tmp_path / "logs/run.log")


def _with_log(scene: Scene, tmp_path: Path, text: str, pid: int = 12) -> Scene:
    path = tmp_path / f"worker-{pid}.err"
    path.write_text(text, encoding="utf-8")
    other = tmp_path / "other.err"
    other.write_text("ValueError: of another worker\n", encoding="utf-8")
    here = socket.gethostname()
    workers = (WorkerLog(here, pid, str(path)), WorkerLog(here, 99, str(other)))
    return Scene(scene.step, scene.stage, workers, scene.log)


@pytest.mark.parametrize("in_log", [False, True])
def test_an_engine_without_room_for_its_context(scene: Scene, tmp_path: Path, in_log: bool) -> None:
    """In one process with its worker the engine raises this; from a process of its own it writes it to the log."""
    where = _with_log(scene, tmp_path, ENGINE_LOG) if in_log else scene
    text = "RuntimeError: Engine core initialization failed. See root cause above." if in_log else CACHE
    error = as_ours(where, RayTaskError("task", "", RuntimeError(text)))
    assert isinstance(error, ResourceError)
    assert "generate: a context of 8,192 tokens needs 0.35 GiB" in error.message
    assert "its engine has 0.25 GiB" in error.message
    assert str(scene.log) in error.message
    assert "generate.max_model_tokens to 5824 or less" in error.hint
    needed = int(error.hint.split("kv_cache_bytes to ")[1].split(" ")[0])
    assert 0.35 * 2**30 <= needed <= 0.36 * 2**30


def test_a_worker_that_was_killed(scene: Scene, tmp_path: Path) -> None:
    where = _with_log(scene, tmp_path, "")
    died = ActorDiedError()
    died.error_msg = "The actor died unexpectedly before finishing this task.\n\tpid: 12\nConnection lost."
    error = as_ours(where, died)
    assert isinstance(error, StageError)
    assert "step generate failed: the process of its engine was killed" in str(error)
    assert "SIGKILL" in str(error)
    assert "wrote nothing" in str(error)
    assert f"(log: {scene.log})" in str(error)
    assert "generate.max_sequences" in error.hint


def test_a_worker_that_crashed_on_an_instruction(scene: Scene, tmp_path: Path) -> None:
    died = ActorDiedError()
    died.error_msg = "The actor died unexpectedly before finishing this task.\n\tpid: 12"
    error = as_ours(_with_log(scene, tmp_path, CRASH), died)
    assert "SIGILL" in str(error)
    assert "last line: Fatal Python error: Illegal instruction" in str(error)
    assert scene.log is not None
    log = scene.log.read_text(encoding="utf-8")
    assert "*** SIGILL received" in log
    assert "of another worker" not in log


def test_the_log_of_a_task_that_crashed_is_any_of_its_step(scene: Scene, tmp_path: Path) -> None:
    error = as_ours(_with_log(scene, tmp_path, "MemoryError: first\n"), WorkerCrashedError())
    assert "ValueError: of another worker" in str(error)


def test_memory_that_ran_low(scene: Scene) -> None:
    text = "2 worker(s) were killed due to the node running low on memory. Memory: 22.5GB / 23.4GB (0.96)"
    error = as_ours(Scene("train:sft", "train", (), scene.log), OutOfMemoryError(text))
    assert (
        "step train:sft failed: Ray ended one of its worker processes because memory ran low (22.5GB of 23.4GB"
        in str(error)
    )
    assert isinstance(error, StageError)
    assert "train.micro_batch_size or train.num_workers" in error.hint


def test_the_worker_that_died_counts_and_not_the_one_that_lost_its_connection(scene: Scene) -> None:
    lost = RayTaskError("task", "", RuntimeError("Connection closed by peer"))
    killed = OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.")
    failed = WorkerGroupError("two ranks", {0: lost, 1: killed})
    assert "memory ran low" in str(as_ours(Scene("train:sft", "train", (), scene.log), failed))


def test_what_ray_data_wraps_is_quoted_from_its_text(scene: Scene) -> None:
    text = "ray::MapBatches()\n\nray.exceptions.UserCodeException: Failed to process\nKeyError: 'a'"
    wrapped = RayTaskError("task", text, UserCodeException("Failed to process"))
    assert "step generate failed: KeyError: 'a'" in str(as_ours(scene, wrapped))


def test_a_users_error_stays(scene: Scene) -> None:
    assert str(as_ours(scene, RayTaskError("task", "", DataError("a", "b")))) == "a → b"


def test_an_error_in_a_constructor_is_quoted_and_not_ray_s_words(scene: Scene) -> None:
    died = ActorDiedError()
    died._actor_init_failed = True
    died.error_msg = (
        "The actor died because of an error raised in its creation task, ray::X (pid=3)\nOSError: no such file"
    )
    assert "step generate failed: OSError: no such file" in str(as_ours(scene, died))


def test_fields_that_are_named_exist() -> None:
    resources = Resources()
    for section, fields in _LESS_MEMORY.items():
        assert set(fields) <= set(type(getattr(resources, section)).model_fields)


def test_nothing_is_read_from_other_machines(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "secret.err"
    path.write_text("ValueError: here\n", encoding="utf-8")
    elsewhere = Scene("generate", "generate", (WorkerLog("another.host", os.getpid(), str(path)),), scene.log)
    assert "ValueError: here" not in str(as_ours(elsewhere, WorkerCrashedError()))
    assert scene.log is not None
    assert f"another.host: {path}" in scene.log.read_text(encoding="utf-8")
