"""The cells of the heat map of distances between blocks, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.run.model import Plan

MAX_NUMBERED = 16
"""Cells carry their figures for up to this many blocks."""


@dataclass(frozen=True)
class HeatCell:
    """The run of n blocks from `start`. `lowest`: the first of the smallest for this n, as the plan takes it."""

    start: int
    n: int
    value: float
    color: str
    ink: str
    label: str
    lowest: bool
    chosen: bool


def heat_cells(matrix: Sequence[Sequence[float | None]], plan: Plan | None) -> list[HeatCell]:
    """The distances `matrix[n - 1][start]`, dark where they are large, in a colour map for colour-blind readers too."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    every = [value for row in matrix for value in row if value is not None]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    cut, cells = plan.cut if plan is not None else None, []
    for n, row in enumerate(matrix, 1):
        least = row.index(min(value for value in row if value is not None))
        for start, value in enumerate(row):
            if value is not None:
                share = (value - low) / (high - low) if high > low else 0.0
                color = to_hex(colormaps["cividis"](1 - share))
                label = f"{value:.2f}".removeprefix("0")
                ink, is_cut = _ink(color), (start, n) == cut
                cells.append(HeatCell(start, n, value, color, ink, label, start == least, is_cut))
    return cells


def _ink(color: str) -> str:
    """Black or white, whichever contrasts more with `color` (relative luminance of WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"
