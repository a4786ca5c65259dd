"""What killed a process: from real processes, and from what Ray and vLLM write of one that is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.progress.killed import killed, signal_in, signal_words
from sdft_ray.progress.logs import tail

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
