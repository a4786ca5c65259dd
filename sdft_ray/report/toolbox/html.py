"""The Jinja environment of the HTML pages, and what their templates share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sdft_ray.report.toolbox import numbers

NUM_TONES = 6
"""Colours of arms; a seventh arm begins again."""


@cache
def environment() -> Environment:
    """Escapes every expression and refuses undefined names."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        place=_place,
        breakable=_breakable,
        points=lambda value: numbers.number(100 * value, 1),
        percent=numbers.percent,
        count=numbers.count,
        bytes=numbers.num_bytes,
        seconds=numbers.seconds,
        plain=numbers.plain,
        rate=numbers.rate,
        nats=numbers.nats,
    )
    return templates


def _place(value: float) -> str:
    """A length in per cent, as short as it can be written."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def _breakable(name: str) -> Markup:
    """Let long names break after an underscore, a slash or a colon."""
    text = str(escape(name))
    for sign in "_/:":
        text = text.replace(sign, f"{sign}<wbr>")
    return Markup(text)  # noqa: S704  (escaped above)
