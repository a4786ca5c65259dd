"""Progress events, each one JSON line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["stage_started", "progress", "stage_finished", "stage_skipped", "stage_failed", "message"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Event:
    """A change in the state of `stage`.

    `done` and `total` count `unit`s; `total` is None while it is unknown. `wall_s` belongs to `stage_finished`.
    `detail` is the reason for which a stage failed, or the text of a message. `phase` is what a running stage does
    while nothing can be counted, such as "loading the engine".
    """

    event: Kind
    stage: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    wall_s: float | None = None
    detail: str = ""
    phase: str = ""

    def to_json(self) -> str:
        """One line of ASCII, safe in any log; all keys are always present."""
        return json.dumps(asdict(self))


def teller(handle: Callable[[Event], None]) -> Callable[[str], None]:
    """From what displays events to what displays a sentence."""
    return lambda sentence: handle(Event("message", detail=sentence))


_TYPES: dict[str, tuple[type, ...]] = {
    "event": (str,), "stage": (str,), "unit": (str,), "detail": (str,), "phase": (str,), "done": (int, type(None)),
    "total": (int, type(None)), "wall_s": (int, float, type(None)),
}  # fmt: skip


def parse_event(line: str) -> Event | None:
    """The event in a log line, with or without a prefix added by the logger; None for any other line."""
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
