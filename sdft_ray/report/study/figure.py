"""A study's curves as one picture for a README: the plots of the page, about 1,000 pixels wide, on white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_ray.report.study.charts import AHEAD, drawn, row_axis, share_axis, tick_sizes
from sdft_ray.report.study.model import Panel, StudyData

COLORS = ("#d55e00", "#0072b2", "#009e73", "#b5568e", "#2a9bd6", "#b07900")
"""Of arms, as on the page in its light theme; a seventh arm begins again."""
INK, SOFT, LINE = "#15181c", "#586270", "#e1e5ea"
WIDTH_IN, ROW_IN, HEAD_IN = 10.0, 2.6, 0.75
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10.0, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE,
    "axes.titlesize": 10.0, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 9.0, "ytick.labelsize": 9.0,
    "svg.hashsalt": "sdft_ray", "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def study_figure(study: StudyData, path: str | Path) -> None:
    """Write one plot per panel and group of tasks to `path`, whose ending says PNG or SVG.

    Raises `ValueError` for a study without panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not study.panels:
        raise ValueError("a study without panels has nothing to draw")
    rows = _packed(study.panels)
    height = HEAD_IN + ROW_IN * len(rows)
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, height), dpi=100)
        grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
        for line, plots in zip(grid, rows, strict=True):
            for axes, (panel, group) in zip(line, plots, strict=False):
                _plot(axes, study, panel, group)
            for axes in line[len(plots) :]:
                axes.set_axis_off()
            line[0].set_ylabel("recovery, %")
        for column in grid.T:
            last = [axes for axes in column if axes.axison][-1]
            last.set_xlabel("training rows")
        handles, labels = _keys(study)
        figure.legend(handles, labels, loc="upper left", ncols=len(labels), frameon=False, bbox_to_anchor=(0.005, 1.0))
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height), h_pad=3.2)
        suffix = Path(path).suffix.lower()
        figure.savefig(path, metadata={"Date": None} if suffix == ".svg" else None)


def _packed(panels: Sequence[Panel]) -> list[list[tuple[Panel, str]]]:
    """Rows of plots: panels side by side as long as they fit beside each other, none over two rows."""
    width = max(len(panel.groups) for panel in panels)
    rows: list[list[tuple[Panel, str]]] = [[]]
    for panel in panels:
        plots = [(panel, group) for group in panel.groups]
        if len(rows[-1]) + len(plots) > width:
            rows.append([])
        rows[-1] += plots
    return rows


def _plot(axes: Any, study: StudyData, panel: Panel, group: str) -> None:
    """Dots with 95 % intervals, fitted curves, dashed one doubling ahead, and dotted levels."""
    share, ticks = share_axis(panel, group)
    rows = row_axis(study)
    axes.set_title(group, loc="left", color=SOFT)
    if group == panel.groups[0]:
        name = axes.annotate(
            panel.name, (0, 1), (0, 24), xycoords="axes fraction", textcoords="offset points", weight="bold"
        )
        # It runs over the next column, which need not move aside.
        name.set_in_layout(False)
    axes.set_xscale("log")
    axes.set_xlim(rows.smallest / 1.2, rows.largest * AHEAD * 1.06)
    axes.set_ylim(100 * share.low, 100 * share.high)
    axes.set_yticks([100 * tick for tick in ticks])
    axes.set_xticks(tick_sizes(panel, rows), [f"{size:,}" for size in tick_sizes(panel, rows)])
    axes.minorticks_off()
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.axhline(100, color=INK, linestyle=":", linewidth=1.4)
    for pruned in panel.pruned:
        alone = len(pruned.arms) == 1 < len(panel.arms)
        color = _color(study, pruned.arms[0]) if alone else SOFT
        axes.axhline(100 * pruned.recovery[group], color=color, linestyle=":", linewidth=1.4)
    for position, arm in enumerate(panel.arms):
        _arm(axes, panel, arm, group, _color(study, arm), 1.07 ** (position - (len(panel.arms) - 1) / 2))


def _arm(axes: Any, panel: Panel, arm: str, group: str, color: str, aside: float) -> None:
    cells = [cell for cell in drawn(panel.cells) if cell.arm == arm]
    for cell in cells:
        found, n = cell.recovery[group], cell.num_rows * aside
        if found.low is not None and found.high is not None:
            axes.plot([n, n], [100 * found.low, 100 * found.high], color=color, linewidth=1.3)
        axes.plot(n, 100 * found.value, "o", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7)
    line = panel.fits[arm, group].line
    if line and cells:
        largest = cells[-1].num_rows
        sizes = [point.num_rows for point in line]
        axes.fill_between(
            sizes, [100 * p.low for p in line], [100 * p.high for p in line], color=color, alpha=0.1, linewidth=0
        )
        seen, ahead = [p for p in line if p.num_rows <= largest], [p for p in line if p.num_rows >= largest]
        for part, style in ((seen, "-"), (ahead, (0, (3, 2)))):
            axes.plot([p.num_rows for p in part], [100 * p.value for p in part], color=color, linestyle=style)


def _keys(study: StudyData) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=_color(study, arm), marker="o", markersize=4.5) for arm in study.arms]
    keys.append(Line2D([], [], color=SOFT, linestyle=":"))
    return keys, [*study.arms, "pruned alone; teacher at 100 %"]


def _color(study: StudyData, arm: str) -> str:
    return COLORS[study.arms.index(arm) % len(COLORS)]
