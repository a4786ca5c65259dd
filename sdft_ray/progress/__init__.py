"""Progress of a run: events, and the views that display them.

An event is one JSON line, so the log of a job on a remote cluster can feed the same live view as a local run. Views are
context managers with `handle(event)`, which any thread may call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, get_args

from rich.console import Console

from sdft_ray.progress.capture import Terminal, libraries_to, short
from sdft_ray.progress.events import KINDS, Event, parse_event, teller
from sdft_ray.progress.figures import clock_time, seconds
from sdft_ray.progress.live import LiveView
from sdft_ray.progress.plain import JsonView, NoView, PlainView, View

__all__ = [
    "KINDS",
    "VIEWS",
    "Event",
    "JsonView",
    "LiveView",
    "NoView",
    "PlainView",
    "Terminal",
    "View",
    "ViewName",
    "clock_time",
    "libraries_to",
    "open_run_view",
    "open_view",
    "parse_event",
    "seconds",
    "short",
    "teller",
]

ViewName = Literal["auto", "live", "plain", "json", "none"]
VIEWS: tuple[str, ...] = get_args(ViewName)


@contextmanager
def open_run_view(name: ViewName, stages: Sequence[str], log: Path) -> Iterator[View]:
    """The view called `name` has the terminal to itself: what libraries print meanwhile goes to the file `log`."""
    with (
        libraries_to(log) as terminal,
        open_view(name, stages, terminal.out if name == "json" else terminal.err) as view,
    ):
        yield view


def open_view(name: ViewName, stages: Sequence[str], stream: IO[str] | None = None) -> View:
    """The view called `name` over `stages`, in that order.

    "auto" is "live" on a terminal and "plain" elsewhere. Without a `stream`, "json" writes to standard output
    and the others to standard error, which leaves standard output to the result; what is printed meanwhile stands above
    the lines of "live".
    """
    if name == "none":
        return NoView()
    console = Console(file=stream, stderr=name != "json")
    if name == "json":
        return JsonView(console.file)
    if name == "live" or (name == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return LiveView(stages, console, takes_prints=stream is None)
    return PlainView(console.file)
