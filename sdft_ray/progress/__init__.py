"""Progress of a run: events, and the views that display them.

An event is one JSON line, so the log of a job on a remote cluster can feed the same live view as a local run. Views are
context managers with `handle(event)`, which any thread may call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Literal, get_args

from rich.console import Console

from sdft_ray.progress.events import KINDS, Event, parse_event, teller
from sdft_ray.progress.live import LiveView
from sdft_ray.progress.plain import JsonView, NoView, PlainView, View, clock_time, seconds

__all__ = [
    "KINDS",
    "VIEWS",
    "Event",
    "JsonView",
    "LiveView",
    "NoView",
    "PlainView",
    "View",
    "ViewName",
    "clock_time",
    "open_view",
    "parse_event",
    "seconds",
    "teller",
]

ViewName = Literal["auto", "live", "plain", "json", "none"]
VIEWS: tuple[str, ...] = get_args(ViewName)


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
