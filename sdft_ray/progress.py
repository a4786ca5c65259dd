"""How far a run is: events, and the views that show them.

An event is one JSON line, so that the log of a job on a far cluster can feed the same live view as a run at
home. Views are context managers with `handle(event)`, which any thread may call.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, Literal, Protocol, Self, get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

Kind = Literal["stage_started", "progress", "stage_finished", "stage_skipped", "stage_failed", "message"]
KINDS: tuple[str, ...] = get_args(Kind)
ViewName = Literal["auto", "live", "plain", "json", "none"]
VIEWS: tuple[str, ...] = get_args(ViewName)


@dataclass(frozen=True)
class Event:
    """Something happened to `stage`. `done` of `total` are in `unit`; `total` is None while unknown.

    `wall_s` goes with `stage_finished`; `detail` says why a stage failed, or is the text of a message.
    """

    event: Kind
    stage: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    wall_s: float | None = None
    detail: str = ""

    def to_json(self) -> str:
        """One line of ASCII, which no log can break or misread; every key is always there."""
        return json.dumps(asdict(self))


_TYPES: dict[str, tuple[type, ...]] = {
    "event": (str,), "stage": (str,), "unit": (str,), "detail": (str,), "done": (int, type(None)),
    "total": (int, type(None)), "wall_s": (int, float, type(None)),
}  # fmt: skip


def parse_event(line: str) -> Event | None:
    """The event that a log line holds, whatever prefix the log put before it; None for any other line."""
    start = line.find('{"event"')
    if start < 0:
        return None
    try:
        data: Any = json.loads(line[start:])
    except ValueError:
        return None
    if not isinstance(data, dict) or set(data) - {field.name for field in fields(Event)}:
        return None
    if data.get("event") not in KINDS:
        return None
    if any(isinstance(value, bool) or not isinstance(value, _TYPES[key]) for key, value in data.items()):
        return None
    return Event(**data)


class View(Protocol):
    """Shows events between `__enter__` and `__exit__`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *raised: object) -> None: ...
    def handle(self, event: Event) -> None: ...


def open_view(name: ViewName, stages: Sequence[str], stream: IO[str] | None = None) -> View:
    """The view called `name` over `stages`, in that order.

    "auto" is "live" on a terminal and "plain" elsewhere. Without a `stream`, "json" writes to standard output
    and the others to standard error, which leaves standard output to the result.
    """
    if name == "none":
        return NoView()
    console = Console(file=stream, stderr=name != "json")
    if name == "json":
        return JsonView(console.file)
    if name == "live" or (name == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return LiveView(stages, console)
    return PlainView(console.file)


class _Silent:
    """A context manager that has nothing to open or close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        return None


class NoView(_Silent):
    """Shows nothing."""

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
    """For logs: one line when a stage finishes, is reused, or fails; nothing else."""

    def __init__(self, stream: IO[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._started: dict[str, float] = {}
        self._lock = threading.Lock()

    def handle(self, event: Event) -> None:
        """Write a line if the event ends a stage."""
        with self._lock:
            now = self._clock()
            if event.event == "stage_started":
                self._started[event.stage] = now
            said = self._words(event, now - self._started.get(event.stage, now))
            if said:
                self._stream.write(f"{event.stage}: {said}\n")
                self._stream.flush()

    def _words(self, event: Event, waited_s: float) -> str:
        if event.event == "stage_finished":
            return f"done in {seconds(waited_s if event.wall_s is None else event.wall_s)}"
        if event.event == "stage_skipped":
            return "reused"
        if event.event == "stage_failed":
            return f"failed after {seconds(waited_s)}: {event.detail}".rstrip(": ")
        return ""


# --- the live view ------------------------------------------------------------------------------------------

WINDOW_S = 30.0
"""A rate is the slope over this much of the past: steady, yet it follows a stage that changes pace."""
MIN_SAMPLES = 4
MIN_SPAN_S = 2.0
"""Time left is shown once a rate rests on this many figures over this long."""


class _Pace:
    """Figures of the recent past, and the rate that they show."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> None:
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # a worker started again from an earlier point
        self._samples.append((now, done))
        while len(self._samples) > MIN_SAMPLES and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float) -> float | None:
        """Units per second; None while too little is known. Falls when figures stop coming."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        (first, done_first), (last, done_last) = self._samples[0], self._samples[-1]
        span = last - first
        if span < MIN_SPAN_S or done_last <= done_first:
            return None
        usual = span / (len(self._samples) - 1)
        late = max(0.0, now - last - 3 * usual)
        return (done_last - done_first) / (span + late)


@dataclass
class _Line:
    """One stage as the live view knows it."""

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

    80 columns are enough, wider terminals change nothing. When the stages do not fit the height, those that
    ended and those that wait are only counted.
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
        """Note the event; the next redraw shows it. A message is printed above the stages."""
        if event.event == "message":
            self._console.print(Text(event.detail, style="dim"), soft_wrap=False)
            return
        with self._lock:
            self._note(event, self._clock())

    def _note(self, event: Event, now: float) -> None:
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
        """What the terminal shows now."""
        with self._lock:
            lines = list(self._lines.values())
            room = self._console.height - 3
            folded: list[Text] = []
            if len(lines) > room:
                lines, folded = _folded(lines)
            why = [Text(f"{line.name}: {line.detail}", style="red") for line in lines if line.detail]
            shown = [Padding(text, (0, 0, 0, 2)) for text in (*why, *folded, self._footer())]
            return Group(self._table(lines), *shown)

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
            row = self._running(line) if line.state == "running" else self._still(line)
            table.add_row(row.mark, row.name, row.bar, row.count, *([row.rate] if roomy else []), row.ending)
        return table

    def _running(self, line: _Line) -> _Row:
        now = self._clock()
        rate = self._paces[line.name].rate(now)
        ending = _left(line, rate, now - line.started)
        return _Row(self._spinner, Text(line.name, style="bold"), self._bar(line), _count(line), _rate(rate), ending)

    def _still(self, line: _Line) -> _Row:
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
        text = Text(f"{ended} of {len(self._lines)} stages", style="dim")
        if failed:
            text.append(f", {failed} failed", style="red")
        dot = "  ·  " if self._fancy else ", "
        text.append(f"{dot}{clock_time(self._clock() - self._began)}", style="dim")
        return text


def _folded(lines: Sequence[_Line]) -> tuple[list[_Line], list[Text]]:
    """The lines that matter now, and a summary of the others."""
    ended = sum(line.state in ("finished", "reused") for line in lines)
    waiting = sum(line.state == "waiting" for line in lines)
    summary = [f"{count} {word}" for count, word in ((ended, "done"), (waiting, "waiting")) if count]
    shown = [line for line in lines if line.state in ("running", "failed", "stopped")]
    return shown, [Text(", ".join(summary), style="dim")] if summary else []


def _count(line: _Line) -> Text:
    if line.done is None:
        return Text("")
    if line.state == "finished":
        return Text(f"{_whole(line.done)} {line.unit}".rstrip(), style="dim")
    of_total = f"/{_whole(line.total)}" if line.total else ""
    return Text(f"{_whole(line.done)}{of_total} {line.unit}".rstrip())


def _whole(count: int) -> str:
    """28,000, but 12.35M: narrow enough for two in a column."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:,.2f}M"


def _rate(rate: float | None) -> Text:
    if rate is None:
        return Text("")
    for per, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * per >= 0.1 or unit == "h":
            break
    digits = 0 if rate * per >= 100 else 1
    return Text(f"{rate * per:,.{digits}f}/{unit}", style="dim")


def _left(line: _Line, rate: float | None, spent_s: float) -> Text:
    """Time left where it can be told, else time spent."""
    if rate and line.total and line.done is not None and line.done < line.total:
        return Text(f"{clock_time((line.total - line.done) / rate)} left")
    return Text(clock_time(spent_s), style="dim")


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
