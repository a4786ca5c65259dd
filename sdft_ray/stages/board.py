"""Progress reporting from workers to the driver: one small actor holds the latest figures of each step."""

from __future__ import annotations

import time
from typing import Any

import ray

Figures = dict[str, tuple[int, int, str]]


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressBoard:
    """Latest (done, total, unit) per step, and what steps tell the user. Losing it loses no work."""

    def __init__(self) -> None:
        self._figures: Figures = {}
        self._sentences: list[str] = []

    def put(self, step: str, done: int, total: int, unit: str) -> None:
        self._figures[step] = (done, total, unit)

    def read(self) -> Figures:
        return self._figures

    def tell(self, sentence: str) -> None:
        self._sentences.append(sentence)

    def told(self) -> list[str]:
        """All sentences for the user so far."""
        return self._sentences


class ProgressReporter:
    """A step's `Progress`: sends at most a few figures a second, and never waits."""

    def __init__(self, board: Any, step: str, *, interval_s: float = 0.3) -> None:
        self._board = board
        self._step = step
        self._interval_s = interval_s
        self._last = 0.0

    def __call__(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= self._interval_s:
            self._last = now
            self._board.put.remote(self._step, done, total, unit)

    def tell(self, sentence: str) -> None:
        """Show the user a sentence."""
        self._board.tell.remote(sentence)
