"""The figures of a run's page: recovery, distances between blocks and their influence, and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from sdft_ray.report.run.heat import MAX_NUMBERED, HeatCell, heat_cells
from sdft_ray.report.run.model import PRUNED, Distances, LossPoint, Plan, ReportData
from sdft_ray.report.run.words import TUNED, groups
from sdft_ray.report.toolbox.figures import BAD, NARROW, PAPER, SOFT, TONES, WIDE, inline, pixels, y_grid
from sdft_ray.report.toolbox.lanes import Axis, Lane, LaneRow, Lanes
from sdft_ray.report.toolbox.numbers import nice_ticks, percent_error, rate
from sdft_ray.statistics.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Longer loss curves are averaged in bins of equal length."""
_WHITE, _BAD = "#fffffe", "#b23c01"
"""On colours that no theme changes, marks keep theirs: these are not among the tones of the page."""
MAX_TITLED = 48
"""Cells say their figures when pointed at for up to this many blocks."""
_STRIP, _GAP = 112, 34
"""Heights in pixels of the plot of influences, and of the labels of blocks above it."""


# --- recovery -----------------------------------------------------------------------------------------------


def recovery_chart(data: ReportData) -> Lanes | None:
    """Recovery per family and model, tuned families apart; None without recoveries."""
    models = tuple(name for name in (PRUNED, *data.arm_names) if name in data.recovery)
    if not models:
        return None
    tables = [data.recovery[name] for name in models]
    ratios = [ratio for table in tables for ratio in (table.mean, *table.tasks.values())]
    reach = [ratio.value + (ratio.stderr or 0.0) for ratio in ratios if ratio.value is not None]
    ticks = tuple(0.25 * i for i in range(max(4, -int(-max(reach, default=1.0) // 0.25)) + 1))
    axis = Axis(ticks, ticks[-1] * 1.02 if ticks[-1] == 1 else ticks[-1], 1.0)

    def row(name: str, estimates: Sequence[Estimate | None], *, strong: bool = False) -> LaneRow:
        return LaneRow(name, tuple(map(_lane, models, estimates)), strong)

    parts = []
    for group in groups(data):
        rows = [row(task, [table.tasks.get(task) for table in tables]) for task in group.tasks]
        means = [table.tuned if group.name == TUNED else table.off_domain for table in tables]
        if group.name and any(means) and len(rows) > 1:
            rows.append(row("mean", means, strong=True))
        parts += [(group.name, tuple(rows))] if rows else []
    parts.append(("All families", (row("mean", [table.mean for table in tables], strong=True),)))
    labels = tuple(f"{100 * tick:.0f}" for tick in ticks)
    return Lanes("Recovery per family", tuple(parts), axis, (*labels[:-1], f"{labels[-1]} %"), bars=True)


def _lane(model: str, ratio: Estimate | None) -> Lane:
    if ratio is None or ratio.value is None:
        return Lane(model, None, None, None, "–", "–")
    stderr, text = ratio.stderr or 0.0, percent_error(ratio.value, ratio.stderr, 0)
    return Lane(model, ratio.value, max(0.0, ratio.value - stderr), ratio.value + stderr, text, text)


# --- blocks -------------------------------------------------------------------------------------------------


def blocks_figure(title: str, distances: Distances, plan: Plan | None, *, mean: bool, strip: bool) -> Markup:
    """The distances of all runs of blocks; with `strip` also the influence of every block below them."""
    matrix = distances.angular_mean_LN if mean else distances.angular_last_LN
    num_rows = max(1, len(matrix))
    heat = max(5, min(26, 440 // num_rows)) * num_rows

    def draw(figure: Figure, narrow: bool) -> None:
        top = pixels(figure, 2, heat)
        draw_heat(top, matrix, plan, narrow=narrow)
        _heat_key(figure, matrix, plan, narrow=narrow)
        if strip:
            draw_influence(pixels(figure, heat + _GAP, _STRIP), distances, plan, narrow=narrow)

    height = heat + (_GAP + _STRIP + 4 if strip else 24)
    removed = plan.removed_blocks if plan is not None else ()
    label = title
    if strip:
        bars = (
            f"block {block} {_short(value)}{' (removed)' if block in removed else ''}"
            for block, value in enumerate(distances.block_influence_L)
        )
        label = f"{title}. Block influence: {', '.join(bars)}"
    return inline(label, draw, ((WIDE, height), (NARROW, height)))


def draw_heat(axes: Axes, matrix: Sequence[Sequence[float | None]], plan: Plan | None, *, narrow: bool = False) -> None:
    """One cell for each run of n blocks (upward, from 1) and its first block (to the right)."""
    from matplotlib.patches import Rectangle

    num_blocks, cells = len(matrix) + 1, heat_cells(matrix, plan)
    if num_blocks > MAX_TITLED:
        _draw_image(axes, cells, num_blocks)
    for cell in cells:
        # A hair larger than one, or rounding would leave seams between cells.
        titled = not narrow and num_blocks <= MAX_TITLED
        gid = f"title:blocks {cell.start} to {cell.start + cell.n - 1}: {cell.value:.3f}" if titled else None
        corner = (cell.start, cell.n)
        if num_blocks <= MAX_TITLED:
            axes.add_patch(Rectangle(corner, 1.01, 1.01, facecolor=cell.color, linewidth=0, gid=gid))
        middle, ink = (cell.start + 0.5, cell.n + 0.5), "#000000" if cell.ink == "#000" else _WHITE
        if num_blocks <= MAX_NUMBERED:
            weight, size = "bold" if cell.lowest else "normal", 10.5 if narrow else 11
            axes.text(*middle, cell.label, color=ink, ha="center", va="center", fontsize=size, fontweight=weight)
            if cell.lowest:
                axes.plot([middle[0] - 0.2, middle[0] + 0.2], [middle[1] - 0.25] * 2, color=ink, linewidth=1)
        elif cell.lowest:
            axes.plot(
                *middle,
                "o",
                color=_WHITE if cell.ink == "#fff" else "#000000",
                markersize=4 if num_blocks <= MAX_TITLED else 2.4,
            )
        if cell.chosen:
            for color, width in ((_WHITE, 6), (_BAD, 3)):
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=5))
    axes.set_xlim(0, num_blocks)
    axes.set_ylim(1, max(2, num_blocks))
    _block_ticks(axes, num_blocks)
    rows = few_of(1, num_blocks - 1)
    axes.set_yticks([n + 0.5 for n in rows], [str(n) for n in rows])
    _unclipped(axes)


def _draw_image(axes: Axes, cells: Sequence[HeatCell], num_blocks: int) -> None:
    """A pixel a cell: thousands of rectangles would make the page large."""
    import numpy as np
    from matplotlib.colors import to_rgba

    image = np.zeros((num_blocks - 1, num_blocks, 4))
    for cell in cells:
        image[cell.n - 1, cell.start] = to_rgba(cell.color)
    axes.imshow(image, extent=(0, num_blocks, 1, num_blocks), origin="lower", aspect="auto", interpolation="none")


def _heat_key(figure: Figure, matrix: Sequence[Sequence[float | None]], plan: Plan | None, *, narrow: bool) -> None:
    """The scale and the marks, in the corner above the diagonal that no run fills."""
    values = [cell.value for cell in heat_cells(matrix, plan)]
    if not values:
        return
    width = 72 * figure.get_size_inches()[0]
    length = min(250.0, 0.46 * width)
    axes = pixels(figure, 2, 10, left=width - length - 4)
    axes.imshow([list(range(64))], cmap="cividis_r", aspect="auto", interpolation="nearest")
    axes.set_yticks([])
    middle = [] if narrow else [(31.5, "angular distance")]
    ticks = [(0.0, f"{min(values):.2f}"), *middle, (63.0, f"{max(values):.2f}")]
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    first, *_, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    near: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    numbered = len(matrix) < MAX_NUMBERED
    axes.annotate(".00" if numbered else "•", (0, 0), (0, -34), fontsize=11, fontweight="bold", **near)
    axes.annotate("smallest for its n", (0, 0), (28 if numbered else 12, -34), color=SOFT, fontsize=12, **near)
    if plan is not None and plan.cut is not None:
        x, y = (0.0, -52.0) if narrow else (0.62 * length, -34.0)
        frame: dict[str, Any] = {"boxstyle": "square,pad=0.12", "facecolor": "none", "edgecolor": BAD, "linewidth": 3.0}
        axes.annotate("   ", (0, 0), (x + 2, y), fontsize=10, bbox=frame, **near)
        axes.annotate("the cut", (0, 0), (x + 24, y), color=SOFT, fontsize=12, **near)


def draw_influence(axes: Axes, distances: Distances, plan: Plan | None, *, narrow: bool = False) -> None:
    """Bars from zero on the axis of blocks of the distances above, the removed ones hatched."""
    values = distances.block_influence_L
    ticks = nice_ticks(max(values, default=0.0), most=4)
    y_grid(axes, ticks, [f"{tick:g}" for tick in ticks])
    removed = plan.removed_blocks if plan is not None else ()
    for block, value in enumerate(values):
        gone = block in removed
        if gone:
            axes.axvspan(block, block + 1, color=BAD, alpha=0.07, linewidth=0, zorder=0)
        style: dict[str, Any] = (
            {"facecolor": PAPER, "edgecolor": BAD, "hatch": "////"} if gone else {"facecolor": TONES["pruned"]}
        )
        axes.bar(block + 0.5, max(0.0, value), 0.72, **style)
        if len(values) <= MAX_NUMBERED:
            inside = value > 0.85 * ticks[-1]
            axes.annotate(
                _short(value), (block + 0.5, value), (0, -4 if inside else 3), textcoords="offset points", ha="center",
                va="top" if inside else "bottom", color=PAPER if inside and not gone else SOFT,
                fontsize=8.5 if narrow else 11,
            )  # fmt: skip
    axes.set_xlim(0, max(1, len(values)))
    axes.set_xticks([])
    _unclipped(axes)


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    shown = few_of(0, num_blocks - 1)
    axes.set_xticks([block + 0.5 for block in shown], [str(block) for block in shown])


def few_of(first: int, last: int) -> list[int]:
    """All whole numbers of a range, or every 2nd, 4th, 5th, 10th, ... so that there are at most 16 labels."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 1000) if (last - first) / step < MAX_NUMBERED)
    return [value for value in range(first, last + 1) if step == 1 or value % step == 0]


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _unclipped(axes: Axes) -> None:
    """Nothing reaches beyond these axes by more than half a line, and a clip path would be written for each artist."""
    for artist in (*axes.patches, *axes.lines, *axes.texts, *axes.get_xgridlines(), *axes.get_ygridlines()):
        artist.set_clip_on(False)


# --- loss ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossFigure:
    """`ends` has, by arm, the mean loss over the last twentieth of its curve."""

    svg: Markup
    ends: dict[str, float]


def loss_figure(data: ReportData, tones: dict[str, str]) -> LossFigure | None:
    """Loss from 0 upward, and below it the learning rate; None without curves."""
    curves = {name: thinned(points) for name, points in data.loss_curves.items() if points}
    if not curves:
        return None
    ends = {}
    for name, points in curves.items():
        tail = [point.loss for point in points[-max(1, len(points) // 20) :]]
        ends[name] = sum(tail) / len(tail)

    def draw(figure: Figure, narrow: bool) -> None:
        colors = {name: TONES[tones[name]] for name in curves}
        draw_losses(pixels(figure, 8, 240), pixels(figure, 274, 44), curves, colors)

    top = max(point.learning_rate for points in curves.values() for point in points)
    shown = ", ".join(f"{name} ends at {end:.2f}" for name, end in ends.items())
    label = f"Loss curves: {shown}; learning rate, largest {rate(top or 1.0)}"
    return LossFigure(inline(label, draw, ((WIDE, 344), (NARROW, 344))), ends)


def draw_losses(losses: Axes, rates: Axes, curves: dict[str, list[LossPoint]], colors: dict[str, str]) -> None:
    """Raw and smoothed losses over steps from 0; learning rates, smaller, below them."""
    every = [point for points in curves.values() for point in points]
    last = max(1, *(point.step for point in every))
    ticks = nice_ticks(max(point.loss for point in every), most=5)
    top = max(point.learning_rate for point in every) or 1.0
    y_grid(losses, ticks, [f"{tick:g}" for tick in ticks])
    y_grid(rates, (0.0, top), ("0", rate(top)))
    for name, points in curves.items():
        steps, values = [point.step for point in points], [point.loss for point in points]
        losses.plot(steps, values, color=colors[name], linewidth=1, alpha=0.35, clip_on=False)
        losses.plot(steps, smoothed(values), color=colors[name], linewidth=2.25, clip_on=False)
        rates.plot(steps, [p.learning_rate for p in points], color=colors[name], linewidth=1.5, clip_on=False)
    steps = [step for step in nice_ticks(last) if step <= last]
    for axes in (losses, rates):
        axes.set_xlim(0, last)
    losses.set_xticks([])
    rates.set_xticks(steps, [f"{step:,.0f}" for step in steps])


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the curve, narrower toward both ends, so that it never lags behind."""
    reach = max(1, len(values) // 40)
    result = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        window = values[place - near : place + near + 1]
        result.append(sum(window) / len(window))
    return result


def thinned(points: Sequence[LossPoint]) -> list[LossPoint]:
    """At most `MAX_POINTS`, each the mean of a bin at its last step."""
    size = -(-len(points) // MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [LossPoint(part[-1].step, sum(p.loss for p in part) / len(part), part[-1].learning_rate) for part in bins]
