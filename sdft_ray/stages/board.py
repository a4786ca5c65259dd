"""What workers tell the driver: one small actor holds how far each step is, and where its workers write their logs."""

from __future__ import annotations

import os
import socket
import time
from copy import copy
from typing import Any, NamedTuple

import ray


class Figure(NamedTuple):
    """How far a step is. `total` is 0 while unknown, `phase` what it does where nothing can be counted."""

    done: int
    total: int
    unit: str
    phase: str = ""


class WorkerLog(NamedTuple):
    """Where a worker of a step writes what libraries print; `path` is "" where the system does not tell."""

    host: str
    pid: int
    path: str


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressBoard:
    """Latest figures per step and part of it, the logs of its workers, and what steps tell the user.

    Losing it loses no work.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, Figure]] = {}
        self._phases: dict[str, str] = {}
        self._workers: dict[str, list[WorkerLog]] = {}
        self._sentences: list[str] = []

    def put(self, step: str, part: str, figure: Figure) -> None:
        """A count of a part, or a phase of the step, which lasts until somebody counts on."""
        if not figure.phase:
            self._counts.setdefault(step, {})[part] = figure
        self._phases[step] = figure.phase

    def read(self) -> dict[str, Figure]:
        """How far every step is."""
        return {step: merged(self._counts.get(step, {}), phase) for step, phase in self._phases.items()}

    def at_work(self, step: str, worker: WorkerLog) -> None:
        self._workers.setdefault(step, []).append(worker)

    def workers(self, step: str) -> list[WorkerLog]:
        """All that ever worked on a step, the latest last."""
        return self._workers.get(step, [])

    def tell(self, sentence: str) -> None:
        self._sentences.append(sentence)

    def told(self) -> list[str]:
        """All sentences for the user so far."""
        return self._sentences


def merged(counts: dict[str, Figure], phase: str) -> Figure:
    """What the step itself counts (""), or its parts together if that is more: those of a dead worker begin anew."""
    whole = counts.get("", Figure(0, 0, ""))
    parts = [count for part, count in counts.items() if part]
    total = max(whole.total, sum(part.total for part in parts))
    done = max(whole.done, sum(part.done for part in parts))
    unit = next((count.unit for count in (whole, *parts) if count.unit), "")
    return Figure(min(done, total) if total else done, total, unit, phase)


class ProgressReporter:
    """A step's `Progress`: sends at most a few figures a second, and never waits."""

    def __init__(self, board: Any, step: str, part: str = "", *, interval_s: float = 0.3) -> None:
        self._board = board
        self._step = step
        self._part = part
        self._interval_s = interval_s
        self._last = 0.0
        self._driver = self._known = (socket.gethostname(), os.getpid())

    def __call__(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if (total and done >= total) or now - self._last >= self._interval_s:
            self._last = now
            self._send(Figure(done, total, unit))

    def phase(self, text: str) -> None:
        """Tell what the step does now, where nothing can be counted."""
        self._send(Figure(0, 0, "", text))

    def part(self, name: str) -> ProgressReporter:
        """A reporter of one part of the step; the parts' figures are added up."""
        part = copy(self)
        part._part = name
        return part

    def tell(self, sentence: str) -> None:
        """Show the user a sentence."""
        self._board.tell.remote(sentence)

    def _send(self, figure: Figure) -> None:
        here = (socket.gethostname(), os.getpid())
        if here not in (self._known, self._driver):  # the first time in this process
            self._known = here
            self._board.at_work.remote(self._step, WorkerLog(*here, _own_log()))
        self._board.put.remote(self._step, self._part, figure)


def _own_log() -> str:
    """The file that this process's standard error goes to."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:  # no Linux
        return ""
    return path if os.path.isfile(path) else ""
