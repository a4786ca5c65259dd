"""What a user reads when the service does not start."""

from __future__ import annotations

import os
from pathlib import Path

from sdft_ray.serving.failures import start_error
from tests.unit.stages.test_failures import CACHE

DEPLOYING = (
    "Deploying application sdft failed: the deployment 'models' is unhealthy.\nRuntimeError: See root cause above."
)


def _session(folder: Path, text: str) -> tuple[Path, Path]:
    logs = folder / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "serve/replica_sdft_models_1.log").write_text("INFO starting\n", encoding="utf-8")
    worker = logs / "worker-1.err"
    worker.write_text(text, encoding="utf-8")
    old = logs / "worker-0.err"
    old.write_text("KeyError: of an earlier start\n", encoding="utf-8")
    os.utime(old, (1, 1))
    return folder, worker


def test_an_engine_without_room(tmp_path: Path) -> None:
    session, worker = _session(tmp_path, f"ERROR\n{CACHE}\n")
    error = start_error(DEPLOYING, session, 10.0, tmp_path / "serve.log")
    assert "a context of 8,192 tokens needs 0.35 GiB" in error.message
    assert str(worker) in error.message
    assert "engine.kv_cache_bytes" in error.hint


def test_the_line_and_the_file_of_any_other_error(tmp_path: Path) -> None:
    session, worker = _session(tmp_path, "OSError: no such device\n")
    error = start_error(DEPLOYING, session, 10.0, tmp_path / "serve.log")
    assert error.message == "the service does not start: OSError: no such device"
    assert error.hint == f"read the log: {worker}"


def test_without_a_session_there_is_our_own_log(tmp_path: Path) -> None:
    error = start_error("ValueError: bad\n", None, 0.0, tmp_path / "serve.log")
    assert error.message.endswith("ValueError: bad")
    assert error.hint == f"read the log: {tmp_path / 'serve.log'}"


def test_an_engine_that_a_signal_killed(tmp_path: Path) -> None:
    """Ray says that a process is gone; its log says why."""
    session, worker = _session(tmp_path, "Fatal Python error: Illegal instruction\n")
    error = start_error("RuntimeError: The actor died unexpectedly.\n\tpid: 4242\n", session, 10.0, tmp_path / "log")
    assert error.message.startswith("the service does not start: its engine was killed by SIGILL")
    assert "--dtype float32" in error.hint
    assert str(worker) in error.hint
    error = start_error("Failed core proc(s): {'EngineCore_DP0': -9}", None, 0.0, tmp_path / "log")
    assert "killed by SIGKILL: most likely the machine ran out of memory" in error.message
