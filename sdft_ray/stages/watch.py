"""What the driver monitors while steps run: their progress, and the memory of its process tree."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from sdft_ray.progress import Event
from sdft_ray.stages.board import Figure

_REST = 20
"""Linux counts every page of a process to tell its PSS: this many times as long as that took, nobody looks again."""


class Poller:
    """Reads the board a few times a second and shows what changed."""

    def __init__(self, board: Any, show: Any) -> None:
        self._board = board
        self._show = show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self._board

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _poll(self) -> None:
        shown: dict[str, Figure] = {}
        num_told = 0
        while not self._stop.wait(0.5):
            try:
                figures: Any = ray.get(self._board.read.remote(), timeout=10)
                sentences: Any = ray.get(self._board.told.remote(), timeout=10)
            except RayError:
                continue  # the board restarts, or Ray is going down
            for sentence in sentences[num_told:]:
                self._show(Event("message", detail=sentence))
            num_told = len(sentences)  # a board that restarted knows none
            for step, figure in figures.items():
                if shown.get(step) != figure:
                    shown[step] = figure
                    counted = bool(figure.unit)
                    self._show(
                        Event(
                            "progress",
                            step,
                            done=figure.done if counted else None,
                            total=figure.total or None,
                            unit=figure.unit,
                            phase=figure.phase,
                        )
                    )


class MemoryWatch:
    """Peak memory of this process and all that it started, Ray's own processes included.

    A page shared by several processes counts once in all where the system tells (PSS on Linux); adding up plain
    resident sizes would count PyTorch's libraries once per worker.
    """

    def __init__(self) -> None:
        self.peak_rss_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        me, took = psutil.Process(), 0.0
        while not self._stop.wait(max(2.0, _REST * took)):
            start = time.monotonic()
            total = sum(_memory_bytes(process) for process in [me, *me.children(recursive=True)])
            self.peak_rss_bytes = max(self.peak_rss_bytes, total)
            took = time.monotonic() - start


def _memory_bytes(process: psutil.Process) -> int:
    """Zero for a process that ended meanwhile."""
    try:
        full = process.memory_full_info()
        return getattr(full, "pss", full.rss)
    except psutil.Error:
        return 0
