"""Geometry of the other charts. Places are per cent of a plot, so that figures stretch and their text does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.run.blocks_figure import Tick
from sdft_ray.report.run.model import PRUNED, LossPoint, Ratio, ReportData
from sdft_ray.report.run.words import TUNED, groups
from sdft_ray.report.toolbox.numbers import nice_ticks, percent_error

MAX_POINTS = 400
"""Longer loss curves are averaged in bins of equal length."""


@dataclass(frozen=True)
class Lane:
    """One model in one row: a bar from zero, and whiskers of one standard error."""

    model: str
    value: float | None
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class RecoveryRow:
    """A family, or the mean over a group (`strong`)."""

    name: str
    lanes: tuple[Lane, ...]
    strong: bool = False


@dataclass(frozen=True)
class RecoveryGroup:
    name: str
    rows: tuple[RecoveryRow, ...]


@dataclass(frozen=True)
class RecoveryChart:
    """Groups of rows over one axis from 0; `whole` is where 100 % lies."""

    groups: tuple[RecoveryGroup, ...]
    models: tuple[str, ...]
    ticks: tuple[Tick, ...]
    whole: float


def recovery_chart(data: ReportData) -> RecoveryChart | None:
    """Recovery per family and model, tuned families apart; None without recoveries."""
    names = tuple(name for name in (PRUNED, *data.arm_names) if name in data.recovery)
    if not names:
        return None
    tables = [data.recovery[name] for name in names]
    ratios = [ratio for table in tables for ratio in (table.mean, *table.tasks.values())]
    reach = [ratio.value + (ratio.stderr or 0.0) for ratio in ratios if ratio.value is not None]
    ticks = [0.25 * i for i in range(max(4, -int(-max(reach, default=1.0) // 0.25)) + 1)]
    end = ticks[-1] * 1.02 if ticks[-1] == 1 else ticks[-1]

    def row(name: str, found: Sequence[Ratio | None], *, strong: bool = False) -> RecoveryRow:
        lanes = tuple(_lane(model, ratio, end) for model, ratio in zip(names, found, strict=True))
        return RecoveryRow(name, lanes, strong)

    parts = []
    for group in groups(data):
        rows = [row(task, [table.tasks.get(task) for table in tables]) for task in group.tasks]
        means = [table.tuned if group.name == TUNED else table.off_domain for table in tables]
        if group.name and any(means) and len(rows) > 1:
            rows.append(row("mean", means, strong=True))
        parts.append(RecoveryGroup(group.name, tuple(rows)))
    parts.append(RecoveryGroup("All families", (row("mean", [table.mean for table in tables], strong=True),)))
    marks = tuple(Tick(100 * tick / end, f"{100 * tick:.0f}") for tick in ticks)
    return RecoveryChart(tuple(part for part in parts if part.rows), names, marks, 100 / end)


def _lane(model: str, ratio: Ratio | None, end: float) -> Lane:
    if ratio is None or ratio.value is None:
        return Lane(model, None, None, None, "–")
    stderr = ratio.stderr or 0.0
    low, high = max(0.0, ratio.value - stderr), ratio.value + stderr
    text = percent_error(ratio.value, ratio.stderr, 0)
    return Lane(model, 100 * ratio.value / end, 100 * low / end, 100 * high / end, text)


@dataclass(frozen=True)
class Curve:
    """One arm: SVG polylines in a 1000 x 1000 box, y downward."""

    model: str
    raw: str
    smooth: str
    rate: str
    last: float
    """Mean loss over the last twentieth of the curve."""


@dataclass(frozen=True)
class LossChart:
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    largest_rate: float


def loss_chart(data: ReportData) -> LossChart | None:
    """Loss from 0 upward, and learning rate as a share of the largest; None without curves."""
    curves = {name: _thinned(points) for name, points in data.loss_curves.items() if points}
    if not curves:
        return None
    every = [point for points in curves.values() for point in points]
    last_step = max(1, *(point.step for point in every))
    steps = nice_ticks(last_step)
    losses = nice_ticks(max(point.loss for point in every), most=5)
    top_rate = max(point.learning_rate for point in every) or 1.0

    def line(points: Sequence[LossPoint], values: Sequence[float], top: float) -> str:
        pairs = zip(points, values, strict=True)
        return " ".join(f"{1000 * p.step / last_step:.1f},{1000 - 1000 * value / top:.1f}" for p, value in pairs)

    drawn = []
    for name, points in curves.items():
        values = [point.loss for point in points]
        smooth = smoothed(values)
        tail = values[-max(1, len(values) // 20) :]
        last = sum(tail) / len(tail)
        rates = [point.learning_rate for point in points]
        top = losses[-1]
        drawn.append(
            Curve(name, line(points, values, top), line(points, smooth, top), line(points, rates, top_rate), last)
        )
    x_ticks = tuple(Tick(100 * step / last_step, f"{step:,.0f}") for step in steps if step <= last_step)
    y_ticks = tuple(Tick(100 - 100 * loss / losses[-1], f"{loss:g}") for loss in losses)
    return LossChart(tuple(drawn), x_ticks, y_ticks, top_rate)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the curve, narrower toward both ends, so that it never lags behind."""
    reach = max(1, len(values) // 40)
    result = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        window = values[place - near : place + near + 1]
        result.append(sum(window) / len(window))
    return result


def _thinned(points: Sequence[LossPoint]) -> list[LossPoint]:
    size = -(-len(points) // MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [LossPoint(part[-1].step, sum(p.loss for p in part) / len(part), part[-1].learning_rate) for part in bins]
