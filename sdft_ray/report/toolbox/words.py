"""Sentences: pieces with figures in them, and lists of names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """A piece of a sentence; a `strong` one carries a figure, of the model named, if any."""

    text: str
    strong: bool = False
    model: str = ""


def joined(names: Sequence[str]) -> str:
    """a, b and c; "" without names."""
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last
