"""The figure over the decoder blocks: distances for every run of blocks, influence of each, and the cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.run.model import Distances, Plan
from sdft_ray.report.toolbox.numbers import nice_ticks

_CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
"""Ten points of cividis, a colour map that reads alike with and without colour blindness."""

MAX_NUMBERED = 16
"""Cells carry their figures up to this many blocks."""


@dataclass(frozen=True)
class Cell:
    """One run of n blocks from `start`. Places are per cent of the plot; y grows downward, n upward."""

    start: int
    n: int
    value: float
    x: float
    y: float
    color: str
    ink: str
    label: str
    lowest: bool
    """The smallest distance for this n; the first of equals, as the plan takes it."""


@dataclass(frozen=True)
class Tick:
    """A label at a place, in per cent of the axis."""

    at: float
    label: str


@dataclass(frozen=True)
class HeatMap:
    """Cells of one distance matrix, and how to draw them."""

    cells: tuple[Cell, ...]
    cell_width: float
    cell_height: float
    height_px: int
    rows: tuple[Tick, ...]
    low: float
    high: float
    stops: tuple[str, ...]
    chosen: Cell | None
    numbered: bool


@dataclass(frozen=True)
class InfluenceBar:
    """One block; `height` in per cent of the plot."""

    block: int
    x: float
    height: float
    label: str
    removed: bool


@dataclass(frozen=True)
class Influence:
    """Block influence, on the same horizontal axis as the heat map above it."""

    bars: tuple[InfluenceBar, ...]
    bar_width: float
    ticks: tuple[Tick, ...]
    numbered: bool


def heat_map(matrix: Sequence[Sequence[float | None]], plan: Plan | None) -> HeatMap:
    """The distances `matrix[n - 1][start]` of L blocks as cells; n = 1 lies on the block axis at the bottom."""
    num_blocks = len(matrix) + 1
    known = [[value for value in row if value is not None] for row in matrix]
    every = [value for row in known for value in row]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    width, height = 100 / num_blocks, 100 / max(1, num_blocks - 1)
    cells = []
    for index, row in enumerate(matrix):
        for start, value in enumerate(row):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            color = _color(1 - share)
            cells.append(
                Cell(
                    start,
                    index + 1,
                    value,
                    start * width,
                    100 - (index + 1) * height,
                    color,
                    _ink(color),
                    f"{value:.2f}".removeprefix("0"),
                    start == row.index(min(known[index])),
                )
            )
    cut = plan.cut if plan is not None else None
    chosen = next((cell for cell in cells if (cell.start, cell.n) == cut), None)
    rows = tuple(Tick(100 - (n - 0.5) * height, str(n)) for n in _every(1, num_blocks - 1))
    cell_px = max(5, min(26, 440 // max(1, num_blocks - 1)))
    stops = tuple(_color(1 - i / 8) for i in range(9))
    return HeatMap(
        tuple(cells), width, height, cell_px * (num_blocks - 1), rows, low, high, stops, chosen,
        num_blocks <= MAX_NUMBERED,
    )  # fmt: skip


def influence(distances: Distances, plan: Plan | None) -> Influence:
    """Bars from zero, the removed blocks marked."""
    values = distances.block_influence
    ticks = nice_ticks(max(values, default=0.0), most=4)
    removed = set(plan.removed_blocks) if plan is not None else set()
    width = 100 / max(1, len(values))
    bars = tuple(
        InfluenceBar(
            block, block * width, 100 * max(0.0, value) / ticks[-1], f"{value:.2f}".removeprefix("0"), block in removed
        )
        for block, value in enumerate(values)
    )
    marks = tuple(Tick(100 - 100 * tick / ticks[-1], f"{tick:g}") for tick in ticks)
    return Influence(bars, width, marks, len(values) <= MAX_NUMBERED)


def block_ticks(num_blocks: int) -> tuple[Tick, ...]:
    """Labels of the block axis, centred under their columns."""
    return tuple(Tick((block + 0.5) * 100 / num_blocks, str(block)) for block in _every(0, num_blocks - 1))


def _every(first: int, last: int) -> list[int]:
    """All whole numbers of a range, or every 2nd, 5th, 10th, ... so that at most 16 labels stand."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if (last - first) / step < MAX_NUMBERED)
    return [value for value in range(first, last + 1) if step == 1 or value % step == 0]


def _color(share: float) -> str:
    """Cividis at `share` in [0, 1], as #rrggbb."""
    place = share * (len(_CIVIDIS) - 1)
    lower = min(int(place), len(_CIVIDIS) - 2)
    part = place - lower
    ends = (_rgb(_CIVIDIS[lower]), _rgb(_CIVIDIS[lower + 1]))
    mixed = (round(a + (b - a) * part) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ink(color: str) -> str:
    """Black or white, whichever contrasts more with `color` (relative luminance of WCAG 2)."""
    channels = [channel / 255 for channel in _rgb(color[1:])]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[:2], 16), int(color[2:4], 16), int(color[4:], 16)
