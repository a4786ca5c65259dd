"""A study's curves: small plots side by side on its page, and one picture for a README, about 1,000 pixels wide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from sdft_ray.report.study.model import Cell, Panel, StudyData
from sdft_ray.report.study.words import bounds
from sdft_ray.report.toolbox.figures import ARM_COLORS, INK, LINE, SOFT, TONES, inline, pixels, y_grid
from sdft_ray.report.toolbox.numbers import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AHEAD = 2.0
"""Fitted curves are drawn, dashed, up to this many times the largest size."""
_OVER = 0.25
"""The share of a step that a plot may reach above its last tick."""
_MIN_SPAN = 0.02
"""The least range of recovery that a plot spreads over its height."""
_PLOT = (325, 262)
"""Width and height in pixels of a plot of the page."""
_WIDTH_IN, _ROW_IN, _HEAD_IN = 10.0, 2.6, 0.75
_PICTURE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10.0, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE,
    "axes.titlesize": 10.0, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 9.0, "ytick.labelsize": 9.0,
    "svg.hashsalt": "sdft_ray", "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


class Span(NamedTuple):
    """An axis from `low` to `high`: of recovery, or of rows, which is logarithmic and the same for a whole study."""

    low: float
    high: float


def drawn(cells: Sequence[Cell]) -> list[Cell]:
    """Those that a logarithmic axis can show."""
    return [cell for cell in cells if cell.num_rows > 0]


def row_axis(study: StudyData) -> Span:
    """From below the smallest size of the study to above twice its largest, with room for marks."""
    sizes = [cell.num_rows for panel in study.panels for cell in drawn(panel.cells)] or [1]
    return Span(min(sizes) / 1.2, max(sizes) * AHEAD * 1.06)


def share_axis(panel: Panel, group: str) -> tuple[Span, list[float]]:
    """An axis that holds all marks and curves, and 100 % and the pruned model where they are near; and its ticks."""
    recoveries = [cell.recovery[group] for cell in drawn(panel.cells)]
    ends = [end for part in recoveries for end in (part.value, part.low, part.high) if end is not None]
    ends += [point.value for arm in panel.arms if (arm, group) in panel.fits for point in panel.fits[arm, group].line]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    span = max(high - low, _MIN_SPAN)
    levels = [1.0, *(pruned.recovery[group] for pruned in panel.pruned)]
    ends += [level for level in levels if low - span <= level <= high + span]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    ticks = _ticks(low, max(high, low + _MIN_SPAN))
    return Span(ticks[0], max(ticks[-1], high)), ticks


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


def tick_sizes(panel: Panel, axis: Span) -> list[int]:
    """The sizes of a panel, from the largest down, without those whose labels would lie on one another."""
    apart, sizes = 0.11 * math.log(axis.high / axis.low), list[int]()
    for size in sorted((size for size in panel.sizes if size > 0), reverse=True):
        if not sizes or math.log(sizes[-1] / size) > apart:
            sizes.append(size)
    return sizes[::-1]


def levels(panel: Panel, group: str) -> list[tuple[float, tuple[str, ...], str]]:
    """Recoveries of models that were not trained: value, arms that start there (() for the teacher), where it lies.

    The last is "" inside of the plot, else a sentence.
    """
    share, result = share_axis(panel, group)[0], []
    for value, arms in ((1.0, ()), *((pruned.recovery[group], pruned.arms) for pruned in panel.pruned)):
        whose = f" ({', '.join(arms)})" if len(panel.pruned) > 1 else ""
        name = f"pruned alone{whose}: {percent(value)}," if arms else "100 % lies"
        outside = "below" if value < share.low else "above" if value > share.high else ""
        result.append((value, arms, f"{name} {outside}" if outside else ""))
    return result


# --- one plot -----------------------------------------------------------------------------------------------


def plot(axes: Axes, study: StudyData, panel: Panel, group: str) -> None:
    """Dots with 95 % intervals, fitted curves, dashed one doubling ahead, and dotted levels; in per cent."""
    share, ticks = share_axis(panel, group)
    rows = row_axis(study)
    axes.set_xscale("log")
    axes.set_xlim(rows.low, rows.high)
    sizes = tick_sizes(panel, rows)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    digits = 0 if ticks[1] - ticks[0] >= 0.0099 else 1
    y_grid(axes, [100 * tick for tick in ticks], [number(100 * tick, digits) for tick in ticks])
    axes.set_ylim(100 * share.low, 100 * share.high)
    for value, arms, outside in levels(panel, group):
        alone = len(arms) == 1 < len(panel.arms)
        color = _color(study, arms[0]) if alone else TONES["pruned"] if arms else TONES["teacher"]
        if not outside:
            axes.axhline(100 * value, color=color, linestyle=(0, (1, 2.4)), linewidth=1.5, clip_on=False)
    for place, arm in enumerate(panel.arms):
        _arm(axes, panel, arm, group, _color(study, arm), 1.07 ** (place - (len(panel.arms) - 1) / 2))


def _arm(axes: Axes, panel: Panel, arm: str, group: str, color: str, aside: float) -> None:
    """Marks stand a little aside, so that the error bars of two arms do not lie on each other."""
    cells = [cell for cell in drawn(panel.cells) if cell.arm == arm]
    line = panel.fits[arm, group].line if (arm, group) in panel.fits else ()
    if line and cells:
        largest = cells[-1].num_rows
        low, high = [100 * point.low for point in line], [100 * point.high for point in line]
        axes.fill_between([point.num_rows for point in line], low, high, color=color, alpha=0.1, linewidth=0)
        seen, ahead = [p for p in line if p.num_rows <= largest], [p for p in line if p.num_rows >= largest]
        for part, style in ((seen, "-"), (ahead, (0, (3, 2)))):
            axes.plot([p.num_rows for p in part], [100 * p.value for p in part], color=color, linestyle=style, lw=2)
    for cell in cells:
        result, x = cell.recovery[group], cell.num_rows * aside
        if result.low is not None and result.high is not None:
            axes.plot([x, x], [100 * result.low, 100 * result.high], color=color, linewidth=1.5, clip_on=False)
        gid = f"title:{arm}, {cell.num_rows:,} rows: {percent(result.known)}{bounds(result)}"
        axes.plot(
            x, 100 * result.known, "o", color=color, markersize=6.5, markeredgecolor="white", gid=gid, clip_on=False
        )


def _color(study: StudyData, arm: str) -> str:
    return ARM_COLORS[study.arms.index(arm) % len(ARM_COLORS)]


# --- the page -----------------------------------------------------------------------------------------------


def small_plots(study: StudyData, panel: Panel) -> list[tuple[str, Markup, list[str]]]:
    """For each group of tasks its name, its plot, and where levels lie that are outside of it."""

    def svg(group: str) -> Markup:
        def draw(figure: Figure, narrow: bool) -> None:
            plot(pixels(figure, 6, 230), study, panel, group)

        return inline(label(panel, group), draw, (_PLOT,))

    return [
        (group, svg(group), [outside for _, _, outside in levels(panel, group) if outside]) for group in panel.groups
    ]


def label(panel: Panel, group: str) -> str:
    """What is drawn, for those who do not see it."""
    ends = []
    for arm in panel.arms:
        cells = [cell for cell in drawn(panel.cells) if cell.arm == arm]
        if cells:
            first_last = [f"{percent(c.recovery[group].known)} at {c.num_rows:,}" for c in (cells[0], cells[-1])]
            ends.append(f"{arm} {' to '.join(dict.fromkeys(first_last))}")
    return f"Recovery by training rows, {panel.name}, {group}: {'; '.join(ends)}"


# --- the picture --------------------------------------------------------------------------------------------


def study_figure(study: StudyData, path: str | Path) -> None:
    """Write one plot per panel and group of tasks to `path`, whose ending says PNG or SVG.

    Raises `ValueError` for a study without panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not study.panels:
        raise ValueError("a study without panels has nothing to draw")
    rows = _packed(study.panels)
    height = _HEAD_IN + _ROW_IN * len(rows)
    with rc_context(_PICTURE):
        figure = Figure(figsize=(_WIDTH_IN, height), dpi=100)
        grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
        for line, plots in zip(grid, rows, strict=True):
            for axes, (panel, group) in zip(line, plots, strict=False):
                _titled(axes, study, panel, group)
            for axes in line[len(plots) :]:
                axes.set_axis_off()
            line[0].set_ylabel("recovery, %")
        for column in grid.T:
            [axes for axes in column if axes.axison][-1].set_xlabel("training rows")
        keys = [Line2D([], [], color=_color(study, arm), marker="o", markersize=4.5) for arm in study.arms]
        keys.append(Line2D([], [], color=SOFT, linestyle=":"))
        labels = [*study.arms, "pruned alone; teacher at 100 %"]
        figure.legend(keys, labels, loc="upper left", ncols=len(labels), frameon=False, bbox_to_anchor=(0.005, 1.0))
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height), h_pad=3.2)
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)


def _titled(axes: Axes, study: StudyData, panel: Panel, group: str) -> None:
    plot(axes, study, panel, group)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(group, loc="left", color=SOFT)
    if group == panel.groups[0]:
        name = axes.annotate(
            panel.name, (0, 1), (0, 24), xycoords="axes fraction", textcoords="offset points", weight="bold"
        )
        # It runs over the next column, which need not move aside.
        name.set_in_layout(False)


def _packed(panels: Iterable[Panel]) -> list[list[tuple[Panel, str]]]:
    """Rows of plots: panels side by side as long as they fit beside each other, none over two rows."""
    parts = [[(panel, group) for group in panel.groups] for panel in panels]
    width, rows = max(map(len, parts)), list[list[tuple[Panel, str]]]([[]])
    for plots in parts:
        if len(rows[-1]) + len(plots) > width:
            rows.append([])
        rows[-1] += plots
    return rows
