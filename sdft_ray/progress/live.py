"""The live view: a table with one line per stage, readable at 80 columns.

Drawing is rich's (`Live`, `Table`, `ProgressBar`, `Spinner`). Rates and remaining time are computed here, not by
`rich.progress.Progress`: that shows no rate for a stage with one update every 40 s, and keeps its last rate and
remaining time when updates stop or a worker restarts (docs/libraries.md).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from sdft_ray.progress.events import Event
from sdft_ray.progress.plain import clock_time, seconds

WINDOW_S = 30.0
"""A rate is the slope over the last so many seconds: steady, yet it follows a stage that changes its speed."""
MIN_SAMPLES = 4
MIN_SPAN_S = 2.0
"""A rate and the remaining time are shown once there are this many updates over this many seconds."""


class _Pace:
    """Recent updates of a stage, and the rate that follows from them."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # a worker restarted from an earlier point
        self._samples.append((now, done))
        while len(self._samples) > MIN_SAMPLES and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float) -> float | None:
        """Units per second; None while there are too few updates. Falls when updates stop arriving."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        (first, done_first), (last, done_last) = self._samples[0], self._samples[-1]
        span = last - first
        if span < MIN_SPAN_S or done_last <= done_first:
            return None
        interval = span / (len(self._samples) - 1)
        overdue = max(0.0, now - last - 3 * interval)
        return (done_last - done_first) / (span + overdue)


@dataclass
class _Line:
    """The state of one stage."""

    name: str
    state: Literal["waiting", "running", "finished", "reused", "failed", "stopped"] = "waiting"
    started: float = 0.0
    wall_s: float = 0.0
    done: int | None = None
    total: int | None = None
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Row:
    """The cells of one line on the screen."""

    mark: RenderableType
    name: RenderableType
    bar: RenderableType = ""
    count: RenderableType = ""
    rate: RenderableType = ""
    ending: RenderableType = ""


class LiveView:
    """One line per stage on a terminal, redrawn in place; several stages may run at the same time.

    80 columns are enough; wider terminals look the same. When the terminal is too low for all stages, finished and
    waiting ones are only counted.
    """

    def __init__(
        self,
        stages: Sequence[str],
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._lines = {name: _Line(name) for name in stages}
        self._paces: dict[str, _Pace] = {}
        self._spinner = Spinner("dots" if self._fancy else "line", style="bold cyan")
        self._began = clock()
        self._lock = threading.Lock()
        self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=5)

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            now = self._clock()
            for line in self._lines.values():
                if line.state == "running":
                    line.state, line.wall_s = "stopped", now - line.started
        self._live.stop()

    def handle(self, event: Event) -> None:
        """Record the event; the next redraw shows it. A message is printed above the stages."""
        if event.event == "message":
            self._console.print(Text(event.detail, style="dim"), soft_wrap=False)
            return
        with self._lock:
            self._record(event, self._clock())

    def _record(self, event: Event, now: float) -> None:
        line = self._lines.setdefault(event.stage, _Line(event.stage))
        if event.event == "stage_skipped":
            line.state = "reused"
            return
        if event.event in ("stage_started", "progress") and line.state != "running":
            line.state, line.started = "running", now
            line.done = line.total = None
            self._paces[line.name] = _Pace()
        if event.event == "progress":
            line.done, line.total, line.unit = event.done, event.total, event.unit
            self._paces[line.name].add(now, event.done or 0)
        elif event.event in ("stage_finished", "stage_failed"):
            began = line.started if line.state == "running" else now
            line.state = "finished" if event.event == "stage_finished" else "failed"
            line.wall_s = now - began if event.wall_s is None else event.wall_s
            line.detail = event.detail

    @property
    def _fancy(self) -> bool:
        return self._console.encoding.lower().startswith("utf") and not self._console.legacy_windows

    def render(self) -> RenderableType:
        """The current content of the terminal."""
        with self._lock:
            lines = list(self._lines.values())
            max_lines = self._console.height - 3
            folded: list[Text] = []
            if len(lines) > max_lines:
                lines, folded = _folded(lines)
            errors = [Text(f"{line.name}: {line.detail}", style="red") for line in lines if line.detail]
            below = [Padding(text, (0, 0, 0, 2)) for text in (*errors, *folded, self._footer())]
            return Group(self._table(lines), *below)

    def _table(self, lines: Sequence[_Line]) -> Table:
        longest = max((len(line.name) for line in self._lines.values()), default=0)
        roomy = self._console.width >= 78
        columns = [
            Column(width=1),
            Column(width=min(longest, 18), no_wrap=True, overflow="ellipsis"),
            Column(width=14 if roomy else 8),
            Column(width=22 if roomy else 14, justify="right", no_wrap=True, overflow="ellipsis"),
            *([Column(width=8, justify="right", no_wrap=True)] if roomy else []),
            Column(width=12, justify="right", no_wrap=True),
        ]
        table = Table.grid(*columns, padding=(0, 1, 0, 0))
        for line in lines:
            row = self._running_row(line) if line.state == "running" else self._other_row(line)
            table.add_row(row.mark, row.name, row.bar, row.count, *([row.rate] if roomy else []), row.ending)
        return table

    def _running_row(self, line: _Line) -> _Row:
        now = self._clock()
        rate = self._paces[line.name].rate(now)
        ending = _remaining(line, rate, now - line.started)
        return _Row(self._spinner, Text(line.name, style="bold"), self._bar(line), _count(line), _rate(rate), ending)

    def _other_row(self, line: _Line) -> _Row:
        wall, dim_name = Text(seconds(line.wall_s)), Text(line.name, style="dim")
        if line.state == "finished":
            return _Row(self._mark("✔", "+", "green"), Text(line.name), count=_count(line), ending=wall)
        if line.state == "reused":
            return _Row(self._mark("✔", "+", "dim"), dim_name, Text("reused", style="dim"))
        if line.state == "waiting":
            return _Row(self._mark("·", ".", "dim"), dim_name)
        fancy, plain, style = ("✘", "x", "red") if line.state == "failed" else ("■", "-", "yellow")
        name, word = Text(line.name, style=style), Text(line.state, style=style)
        return _Row(self._mark(fancy, plain, style), name, word, _count(line), ending=wall)

    def _mark(self, fancy: str, plain: str, style: str) -> Text:
        return Text(fancy if self._fancy else plain, style=style)

    def _bar(self, line: _Line) -> RenderableType:
        if not line.total:
            return Text("")
        return ProgressBar(line.total, line.done or 0, complete_style="cyan", finished_style="cyan")

    def _footer(self) -> Text:
        ended = sum(line.state in ("finished", "reused") for line in self._lines.values())
        failed = sum(line.state == "failed" for line in self._lines.values())
        text = Text(f"{ended} of {len(self._lines)} steps", style="dim")
        if failed:
            text.append(f", {failed} failed", style="red")
        dot = "  ·  " if self._fancy else ", "
        text.append(f"{dot}{clock_time(self._clock() - self._began)}", style="dim")
        return text


def _folded(lines: Sequence[_Line]) -> tuple[list[_Line], list[Text]]:
    """Running, failed and stopped stages, and a summary of the others."""
    ended = sum(line.state in ("finished", "reused") for line in lines)
    waiting = sum(line.state == "waiting" for line in lines)
    summary = [f"{count} {word}" for count, word in ((ended, "done"), (waiting, "waiting")) if count]
    active = [line for line in lines if line.state in ("running", "failed", "stopped")]
    return active, [Text(", ".join(summary), style="dim")] if summary else []


def _count(line: _Line) -> Text:
    if line.done is None:
        return Text("")
    if line.state == "finished":
        return Text(f"{_whole(line.done)} {line.unit}".rstrip(), style="dim")
    of_total = f"/{_whole(line.total)}" if line.total else ""
    return Text(f"{_whole(line.done)}{of_total} {line.unit}".rstrip())


def _whole(count: int) -> str:
    """28,000, but 12.35M: short enough for two numbers in one column."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:,.2f}M"


def _rate(rate: float | None) -> Text:
    if rate is None:
        return Text("")
    for per, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * per >= 0.1 or unit == "h":
            break
    digits = 0 if rate * per >= 100 else 1
    return Text(f"{rate * per:,.{digits}f}/{unit}", style="dim")


def _remaining(line: _Line, rate: float | None, elapsed_s: float) -> Text:
    """Remaining time if there is a rate and a total, else elapsed time."""
    if rate and line.total and line.done is not None and line.done < line.total:
        return Text(f"{clock_time((line.total - line.done) / rate)} left")
    return Text(clock_time(elapsed_s), style="dim")
