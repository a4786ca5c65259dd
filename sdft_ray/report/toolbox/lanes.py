"""A chart of one line per row: bars from zero or dots, with whiskers, between the row's name and its figures.

Places are per cent of the plot's width, so that the chart stretches with the page and its text does not; every row has
a label of its own for those who do not see it. Drawn by the macro `lanes` of macros.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.toolbox.numbers import nice_ticks


@dataclass(frozen=True)
class Lane:
    """One model in one row; `figure` stands beside the row, `text` in its label."""

    model: str
    value: float | None
    low: float | None
    high: float | None
    figure: str
    text: str


@dataclass(frozen=True)
class LaneRow:
    name: str
    lanes: tuple[Lane, ...]
    strong: bool = False


@dataclass(frozen=True)
class Axis:
    """From the first tick to `end`; `mark` is where a line is drawn through all rows."""

    ticks: tuple[float, ...]
    end: float
    mark: float

    def place(self, value: float) -> float:
        """In per cent of the width."""
        return 100 * (value - self.ticks[0]) / (self.end - self.ticks[0])


@dataclass(frozen=True)
class Lanes:
    """Rows in named groups over one axis; `labels` of its ticks."""

    label: str
    groups: tuple[tuple[str, tuple[LaneRow, ...]], ...]
    axis: Axis
    labels: tuple[str, ...]
    bars: bool


def axis_around_zero(values: Sequence[float]) -> Axis:
    """Round ticks that include all values and 0, in fractions; at least 0.02 wide."""
    low, high = min(0.0, *values), max(0.0, *values)
    step = nice_ticks(max(high - low, 0.02))[1]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = -1, 1
    ticks = tuple(float(f"{place * step:.10g}") for place in range(first, last + 1))
    return Axis(ticks, ticks[-1], 0.0)
