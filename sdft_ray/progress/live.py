"""The live view: a table with one line per stage, readable at 80 columns.

Drawing is rich's (`Live`, `Table`, `ProgressBar`, `Spinner`). Rates and remaining time are computed here, not by
`rich.progress.Progress`: that shows no rate for a stage with one update every 40 s, and keeps its last rate and
remaining time when updates stop or a worker restarts (docs/libraries.md).
"""

from __future__ import annotations

import threading
import time
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
from sdft_ray.progress.figures import Pace, clock_time, rate_text, seconds, seconds_left, whole


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
    phase: str = ""
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
        takes_prints: bool = True,
    ) -> None:
        """`takes_prints`: what Python prints meanwhile is put above the lines, where it would tear them apart."""
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._lines = {name: _Line(name) for name in stages}
        self._paces: dict[str, Pace] = {}
        self._spinner = Spinner("dots" if self._fancy else "line", style="bold cyan")
        self._began = clock()
        self._lock = threading.Lock()
        self._live = Live(
            console=self._console,
            get_renderable=self.render,
            refresh_per_second=5,
            redirect_stdout=takes_prints,
            redirect_stderr=takes_prints,
        )

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
        if event.event == "progress" and line.state not in ("waiting", "running"):
            return  # figures that were on their way when the stage ended
        if event.event in ("stage_started", "progress") and line.state != "running":
            line.state, line.started = "running", now
            line.done, line.total, line.phase = None, None, ""
            self._paces[line.name] = Pace()
        if event.event == "progress":
            line.done, line.total, line.unit, line.phase = event.done, event.total, event.unit, event.phase
            self._paces[line.name].note(now, event.done, event.phase)
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
        if line.phase:
            what, elapsed = Text(line.phase, style="dim"), Text(clock_time(now - line.started), style="dim")
            return _Row(self._spinner, Text(line.name, style="bold"), self._bar(line), what, ending=elapsed)
        rate = self._paces[line.name].rate(now)
        ending, speed = _remaining(line, rate, now - line.started), Text(rate_text(rate) if rate else "", style="dim")
        return _Row(self._spinner, Text(line.name, style="bold"), self._bar(line), _count(line), speed, ending)

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
        return Text(f"{whole(line.done)} {line.unit}".rstrip(), style="dim")
    of_total = f"/{whole(line.total)}" if line.total else ""
    return Text(f"{whole(line.done)}{of_total} {line.unit}".rstrip())


def _remaining(line: _Line, rate: float | None, elapsed_s: float) -> Text:
    """Remaining time if there is a rate and a total, else elapsed time."""
    left = seconds_left(line.done, line.total, rate)
    return Text(clock_time(elapsed_s), style="dim") if left is None else Text(f"{clock_time(left)} left")
