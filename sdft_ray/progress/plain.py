"""Views that need no terminal: none, JSON lines, or one line for each finished stage and each message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import IO, Protocol, Self

from sdft_ray.progress.events import Event


class View(Protocol):
    """Displays events between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *raised: object) -> None: ...
    def handle(self, event: Event) -> None: ...


class _Silent:
    """A context manager with nothing to open or close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        return None


class NoView(_Silent):
    """Displays nothing."""

    def handle(self, event: Event) -> None:
        """Drop the event."""


class JsonView(_Silent):
    """One JSON line per event, written at once."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def handle(self, event: Event) -> None:
        """Write the event."""
        with self._lock:
            self._stream.write(event.to_json() + "\n")
            self._stream.flush()


class PlainView(_Silent):
    """For log files: messages, and one line when a stage finishes, is reused, or fails; nothing else."""

    def __init__(self, stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._started: dict[str, float] = {}
        self._lock = threading.Lock()

    def handle(self, event: Event) -> None:
        """Write a line if the event ends a stage or is a message."""
        with self._lock:
            if event.event == "message":
                self._stream.write(f"{event.detail}\n")
                self._stream.flush()
                return
            now = self._clock()
            if event.event == "stage_started":
                self._started[event.stage] = now
            outcome = self._outcome(event, now - self._started.get(event.stage, now))
            if outcome:
                self._stream.write(f"{event.stage}: {outcome}\n")
                self._stream.flush()

    def _outcome(self, event: Event, elapsed_s: float) -> str:
        if event.event == "stage_finished":
            return f"done in {seconds(elapsed_s if event.wall_s is None else event.wall_s)}"
        if event.event == "stage_skipped":
            return "reused"
        if event.event == "stage_failed":
            return f"failed after {seconds(elapsed_s)}: {event.detail}".rstrip(": ")
        return ""


def clock_time(value_s: float) -> str:
    """0:07, 12:34, 1:02:03; beyond 99 hours in whole days."""
    whole = int(value_s + 0.5)
    if whole >= 360_000:
        return f"{whole // 86_400} d"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value_s: float) -> str:
    """0.4 s, 12.3 s, 2 min 5 s, 1 h 2 min."""
    if value_s < 59.95:
        return f"{value_s:.1f} s"
    minutes, rest = divmod(round(value_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
