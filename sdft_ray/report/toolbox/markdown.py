"""Text that others wrote, as Markdown that shows it and does nothing else."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_CODE = re.compile(r"[\w.:/@+=,-]+", re.ASCII)


class Raw(str):
    """Markdown already."""

    __slots__ = ()


def plain(text: str) -> str:
    """One line without control and formatting characters, which could reorder or hide what a reader sees."""
    return "".join(sign for sign in " ".join(text.split()) if unicodedata.category(sign)[0] != "C")


def escaped(value: Any) -> str:
    """Markdown for a value, as jinja's `finalize`: every expression of a template is shown, never interpreted."""
    if isinstance(value, Raw):
        return value
    text = "".join(_ENTITIES.get(sign, sign) for sign in plain(str(value)))
    return _SPECIAL.sub(r"\\\1", text)


def code(value: Any) -> Raw:
    """In the type of code where nothing in it could end the span or the table's cell; escaped otherwise."""
    text = plain(str(value))
    return Raw(f"`{text}`") if _CODE.fullmatch(text) else Raw(escaped(text))


def fenced(text: str, language: str) -> Raw:
    """A block of code, in a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text.rstrip()}\n{fence}")
