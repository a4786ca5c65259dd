"""What killed a process: from real processes, and from what Ray and vLLM write of one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.progress.killed import killed, signal_in, signal_words, tail, worker_death, worker_log

DIES = "import faulthandler, os; faulthandler.enable(); os.kill(os.getpid(), {})"


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_of_a_real_process_by_its_log(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run([sys.executable, "-c", DIES.format(int(number))], stderr=stream, check=False)
    assert signal_in(tail(log)) is number


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Engine core initialization failed. Failed core proc(s): {'EngineCore_DP0': -4}", signal.SIGILL),
        ("Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down", signal.SIGKILL),
        ("exit codes: {'EngineCore_DP0': -4}", signal.SIGILL),
        ("*** SIGSEGV received at time=1764400000 on cpu 1 ***", signal.SIGSEGV),
        ("the process ended with exit code -15", signal.SIGTERM),
        ("exit code 1", None),
        ("Failed core proc(s): {'EngineCore_DP0': 1}", None),
        ("exit code: 2024-11-29", None),
        ("ValueError: 5 - 4 tokens", None),
        ("", None),
    ],
)
def test_of_what_others_write(said: str, expected: signal.Signals | None) -> None:
    assert signal_in(said) is expected


def test_words() -> None:
    message, step = signal_words(signal.SIGILL, Path("/tmp/ray/worker.err"))
    assert message.startswith("killed by SIGILL: this CPU does not support an instruction")
    assert "--dtype float32" in step
    assert step.endswith("its log is /tmp/ray/worker.err")
    assert "memory" in signal_words(signal.SIGKILL)[0]
    assert "native code crashed" in signal_words(signal.SIGSEGV)[0]
    assert killed("it simply failed") is None
    assert killed("exit code -9") == signal_words(signal.SIGKILL)


def test_the_log_of_a_worker(tmp_path: Path) -> None:
    for pid, text in ((11, "fine"), (12, "Fatal Python error: Illegal instruction"), (13, "fine too")):
        (tmp_path / f"worker-ab-01000000-{pid}.err").write_text(text, encoding="utf-8")
    assert worker_log("class_name: A\n\tpid: 13\n", tmp_path) == tmp_path / "worker-ab-01000000-13.err"
    assert worker_log("the replica died", tmp_path) == tmp_path / "worker-ab-01000000-12.err"
    assert worker_log("pid: 99", tmp_path / "elsewhere") is None


def test_what_ray_says_of_a_worker_that_is_gone(tmp_path: Path) -> None:
    gone = "The actor died unexpectedly before finishing this task.\n\tclass_name: MapWorker\n\tpid: 12\n{}"
    crash = "The worker died unexpectedly while executing this task."
    no_trace = "Worker unexpectedly exits with a connection error code 2. End of file."
    ended = worker_death(gone.format(no_trace), tmp_path)
    assert ended is not None, "nothing wrote why"
    assert "SIGKILL" in ended[0]
    log = tmp_path / "worker-ab-01000000-12.err"
    log.write_text("Fatal Python error: Illegal instruction", encoding="utf-8")
    for said in (gone.format(no_trace), crash):
        ended = worker_death(said, tmp_path)
        assert ended is not None
        assert "SIGILL" in ended[0]
        assert str(log) in ended[1]
    os.utime(log, (0, 0))
    assert worker_death(crash, tmp_path) is None, "that was another one"
    assert worker_death("ValueError: no memory", tmp_path) is None


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    assert tail(tmp_path / "missing") == ""
    (tmp_path / "log").write_text("x" * 100_000 + "end", encoding="utf-8")
    assert tail(tmp_path / "log").endswith("xend")
    assert len(tail(tmp_path / "log")) < 100_000
