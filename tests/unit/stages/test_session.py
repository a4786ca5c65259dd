"""A start of Ray that was too slow, tried again: without Ray. With a real one: tests/ray/test_session.py."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from sdft_ray.stages.session import retry_start

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Start:
    """Raises each of the reasons in turn before it succeeds, and starts a process each time."""

    def __init__(self, reasons: list[str], *arguments: str) -> None:
        self.reasons = reasons
        self.processes: list[subprocess.Popen[bytes]] = []
        self._arguments = arguments

    def __call__(self) -> str:
        self.processes.append(subprocess.Popen([*SLEEP, *self._arguments]))
        if self.reasons:
            raise RuntimeError(self.reasons.pop(0))
        return "started"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None and psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE


def test_a_start_that_timed_out_is_tried_again_and_leaves_nothing() -> None:
    start = Start(["The node TIMED OUT", "timed out again"], "/site-packages/ray/raylet")
    try:
        assert retry_start(start) == "started"
        assert [_is_running(process) for process in start.processes] == [False, False, True]
    finally:
        start.end()


def test_processes_that_are_not_rays_are_left_alone() -> None:
    start = Start(["timed out"], "/somewhere/else")
    try:
        assert retry_start(start) == "started"
        assert all(_is_running(process) for process in start.processes)
    finally:
        start.end()


@pytest.mark.parametrize(
    ("reasons", "attempts"), [(["timed out"] * 9, 3), (["no such file", "timed out"], 1), (["timed out", "refused"], 2)]
)
def test_the_reason_is_raised_after_three_attempts_or_when_it_is_another(reasons: list[str], attempts: int) -> None:
    last = reasons[attempts - 1]
    start = Start(list(reasons), "/site-packages/ray/raylet")
    try:
        with pytest.raises(RuntimeError, match=last):
            retry_start(start)
        assert len(start.processes) == attempts
    finally:
        start.end()
