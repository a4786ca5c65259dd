"""What happened: one event, one JSON line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["stage_started", "progress", "stage_finished", "stage_skipped", "stage_failed", "message"]
KINDS: tuple[str, ...] = get_args(Kind)


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
