"""Views that need no terminal: none, JSON lines, or lines of text for a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Protocol, Self

from sdft_ray.progress.events import Event
from sdft_ray.progress.figures import Pace, rate_text, seconds, seconds_left

TELL_EVERY_S = 45.0
"""A running stage has a line of a log this often: between 30 s and a minute, however late its thread is called."""

MIN_SPAN_S = 10.0
"""A line of a log is looked at for long, so its rate has to rest on more than a burst."""


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


@dataclass
class _Running:
    """What is known of a stage that runs. Times are those of the view's clock."""

    started: float
    told: float
    """When its last line was written, at first when it started."""
    pace: Pace = field(default_factory=Pace)
    done: int | None = None
    total: int | None = None
    unit: str = ""
    phase: str = ""
    phase_began: float = 0.0

    def note(self, event: Event, now: float) -> None:
        """Take over an event's figures."""
        if event.phase != self.phase:
            self.phase, self.phase_began = event.phase, now
        self.done, self.total, self.unit = event.done, event.total, event.unit
        self.pace.note(now, event.done, event.phase)

    def text(self, now: float) -> str:
        """How far it is: `12 of 80 steps, 2.0/s, 34.0 s left`, or `loading the engine, 45.0 s so far`."""
        of_total = "" if self.total is None else f" of {self.total:,}"
        parts = [] if self.done is None else [f"{self.done:,}{of_total} {self.unit}".rstrip()]
        if self.phase:
            return ", ".join([*parts, self.phase, f"{seconds(now - self.phase_began)} so far"])
        rate = self.pace.rate(now, MIN_SPAN_S)
        left = seconds_left(self.done, self.total, rate)
        parts += [] if rate is None else [rate_text(rate)]
        parts += [f"{seconds(now - self.started)} so far" if left is None else f"{seconds(left)} left"]
        return ", ".join(parts)


class PlainView:
    """For log files: messages, the end of each stage, and every 45 s how far each running stage is."""

    def __init__(self, stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._tick_on, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._left.set()
        self._thread.join(timeout=5)

    def handle(self, event: Event) -> None:
        """Record the event; write a line if it ends a stage or is a message."""
        with self._lock:
            if event.event == "message":
                self._write(event.detail)
                return
            now = self._clock()
            if event.event == "stage_started":
                self._ended.discard(event.stage)
                self._running[event.stage] = _Running(now, now)
                return
            if event.event == "progress":
                if event.stage not in self._ended:  # else figures that were on their way when it ended
                    self._running.setdefault(event.stage, _Running(now, now)).note(event, now)
                return
            self._ended.add(event.stage)
            running = self._running.pop(event.stage, None)
            self._write(f"{event.stage}: {_outcome(event, now - running.started if running else 0.0)}")

    def tick(self) -> None:
        """Write how far each stage is that has had no line for `TELL_EVERY_S`."""
        with self._lock:
            now = self._clock()
            for stage, running in self._running.items():
                if now - running.told >= TELL_EVERY_S:
                    running.told = now
                    self._write(f"{stage}: {running.text(now)}")

    def _tick_on(self) -> None:
        while not self._left.wait(1.0):
            self.tick()

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


def _outcome(event: Event, elapsed_s: float) -> str:
    if event.event == "stage_finished":
        return f"done in {seconds(elapsed_s if event.wall_s is None else event.wall_s)}"
    if event.event == "stage_skipped":
        return "reused"
    assert event.event == "stage_failed", "all other events were handled"
    return f"failed after {seconds(elapsed_s)}: {event.detail}".rstrip(": ")
