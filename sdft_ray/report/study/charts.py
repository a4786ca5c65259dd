"""Geometry of a study's curves: small plots side by side, one per group of tasks. Places are per cent of a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.run.blocks_figure import Tick
from sdft_ray.report.study.model import Cell, LinePoint, Panel, StudyData
from sdft_ray.report.study.words import bounds
from sdft_ray.report.toolbox.numbers import number, percent

AHEAD = 2.0
"""Fitted curves are drawn, dashed, up to this many times the largest size."""
_DODGE = 1.3
"""Between the marks of two arms at the same size, so that their error bars do not lie on each other."""
_OVER = 0.25
"""The share of a step that a plot may reach above its last tick."""
_MIN_SPAN = 0.02
"""The least range of recovery that a plot spreads over its height."""


@dataclass(frozen=True)
class Mark:
    """The students of one arm at one size, and the ends of their interval; equal ends where there is none."""

    x: float
    y: float
    top: float
    bottom: float
    label: str


@dataclass(frozen=True)
class Trace:
    """One arm: marks, and SVG points in a box of 1000 x 1000, "" without a curve. `ahead` is extrapolated."""

    arm: str
    marks: tuple[Mark, ...]
    seen: str
    ahead: str
    band: str


@dataclass(frozen=True)
class Level:
    """A dotted line at one recovery: the teacher's, or the pruned model's of some arms."""

    y: float
    arms: tuple[str, ...]
    """() for the teacher."""


@dataclass(frozen=True)
class SmallPlot:
    """One group of tasks in one panel. `beyond` names the levels that lie outside of the plot."""

    group: str
    traces: tuple[Trace, ...]
    levels: tuple[Level, ...]
    beyond: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    label: str
    """For those who do not see it."""


@dataclass(frozen=True)
class Rows:
    """The axis of training rows, logarithmic, the same for all plots of a study."""

    smallest: float
    largest: float

    def place(self, num_rows: float) -> float:
        """In per cent of the plot, with room for marks at both ends."""
        ends = math.log(self.smallest / 1.2), math.log(self.largest * AHEAD * 1.06)
        return 100 * (math.log(num_rows) - ends[0]) / (ends[1] - ends[0])


@dataclass(frozen=True)
class Share:
    """The axis of recovery of one plot, from `low` to `high`."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """In per cent of the plot from its top."""
        return 100 * (self.high - value) / (self.high - self.low)


def drawn(cells: Sequence[Cell]) -> list[Cell]:
    """Those that a logarithmic axis can show."""
    return [cell for cell in cells if cell.num_rows > 0]


def row_axis(study: StudyData) -> Rows:
    """From the smallest size of the study to its largest."""
    sizes = [cell.num_rows for panel in study.panels for cell in drawn(panel.cells)] or [1]
    return Rows(min(sizes), max(sizes))


def share_axis(panel: Panel, group: str) -> tuple[Share, list[float]]:
    """An axis that holds all marks and curves, and 100 % and the pruned model where they are near; and its ticks."""
    found = [cell.recovery[group] for cell in drawn(panel.cells)]
    ends = [end for interval in found for end in interval if end is not None]
    ends += [point.value for arm in panel.arms if (arm, group) in panel.fits for point in panel.fits[arm, group].line]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    span = max(high - low, _MIN_SPAN)
    levels = [1.0, *(pruned.recovery[group] for pruned in panel.pruned)]
    ends += [level for level in levels if low - span <= level <= high + span]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    ticks = _ticks(low, max(high, low + _MIN_SPAN))
    return Share(ticks[0], max(ticks[-1], high)), ticks


def small_plots(panel: Panel, axis: Rows) -> tuple[SmallPlot, ...]:
    """One per group of tasks."""
    return tuple(_small_plot(panel, group, axis) for group in panel.groups)


def _small_plot(panel: Panel, group: str, axis: Rows) -> SmallPlot:
    share, ticks = share_axis(panel, group)
    levels, beyond = [Level(share.place(1.0), ())] if share.low <= 1.0 <= share.high else [], []
    if not levels:
        beyond.append(f"100 % lies {'above' if share.high < 1 else 'below'}")
    for pruned in panel.pruned:
        value = pruned.recovery[group]
        if share.low <= value <= share.high:
            levels.append(Level(share.place(value), pruned.arms))
        else:
            whose = f" ({', '.join(pruned.arms)})" if len(panel.pruned) > 1 else ""
            beyond.append(f"pruned alone{whose}: {percent(value)}, {'below' if value < share.low else 'above'}")
    return SmallPlot(
        group,
        tuple(_trace(panel, arm, group, axis, share) for arm in panel.arms),
        tuple(levels),
        tuple(beyond),
        tuple(Tick(axis.place(size), f"{size:,}") for size in tick_sizes(panel, axis)),
        tuple(Tick(share.place(tick), number(100 * tick, _digits(ticks))) for tick in ticks),
        _label(panel, group),
    )


def _trace(panel: Panel, arm: str, group: str, axis: Rows, share: Share) -> Trace:
    aside = _DODGE * (panel.arms.index(arm) - (len(panel.arms) - 1) / 2)
    marks = []
    for cell in drawn(panel.cells):
        if cell.arm != arm:
            continue
        found = cell.recovery[group]
        low = found.value if found.low is None else found.low
        high = found.value if found.high is None else found.high
        x, label = axis.place(cell.num_rows) + aside, f"{arm}, {cell.num_rows:,} rows: {percent(found.value)}"
        marks.append(Mark(x, share.place(found.value), share.place(high), share.place(low), label + bounds(found)))
    fit = panel.fits.get((arm, group))
    line = fit.line if fit is not None else ()
    largest = max((cell.num_rows for cell in panel.cells if cell.arm == arm), default=0)
    seen, ahead = [p for p in line if p.num_rows <= largest], [p for p in line if p.num_rows >= largest]

    def box(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{10 * axis.place(n):.1f},{10 * share.place(value):.1f}" for n, value in points)

    def middle(points: Sequence[LinePoint]) -> str:
        return box([(point.num_rows, point.value) for point in points])

    round_about = [(p.num_rows, p.high) for p in line] + [(p.num_rows, p.low) for p in reversed(line)]
    return Trace(arm, tuple(marks), middle(seen), middle(ahead), box(round_about))


def tick_sizes(panel: Panel, axis: Rows) -> list[int]:
    """The sizes of a panel, from the largest down, without those whose labels would lie on one another."""
    kept: list[int] = []
    for size in sorted((size for size in panel.sizes if size > 0), reverse=True):
        if not kept or axis.place(kept[-1]) - axis.place(size) > 11:
            kept.append(size)
    return kept[::-1]


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """In steps of 1, 2 or 5 times a power of ten, from the last at or below `low` to the first that `high` is not far
    above: an interval that ends at 102 % asks for no tick beyond 100 %.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / (most - 1)))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first = math.floor(low / step + 1e-9)
        last = max(first + 1, math.ceil(high / step - _OVER))
        if last - first < most:
            break
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _digits(ticks: Sequence[float]) -> int:
    """Decimals, in per cent, that tell ticks apart."""
    return 0 if ticks[1] - ticks[0] >= 0.0099 else 1


def _label(panel: Panel, group: str) -> str:
    said = []
    for arm in panel.arms:
        cells = [cell for cell in drawn(panel.cells) if cell.arm == arm]
        if cells:
            ends = [f"{percent(cell.recovery[group].value)} at {cell.num_rows:,}" for cell in (cells[0], cells[-1])]
            said.append(f"{arm} {' to '.join(dict.fromkeys(ends))}")
    return f"Recovery by training rows, {panel.name}, {group}: {'; '.join(said)}"
