"""Geometry of the figures: where cells, bars and lines stand."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sdft_ray.report.run.figures import (
    MAX_POINTS,
    draw_heat,
    draw_influence,
    draw_losses,
    few_of,
    loss_figure,
    recovery_chart,
    smoothed,
    thinned,
)
from sdft_ray.report.run.heat import HeatCell, heat_cells
from sdft_ray.report.run.model import LossPoint, Plan, ReportData
from sdft_ray.report.run.page import render
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report.made_up import ADJACENT, distances, report_data


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it; of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    srgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def axes() -> Axes:
    return Figure().add_subplot()


def made_up_cells() -> list[HeatCell]:
    return heat_cells(distances().angular_mean_LN, report_data().plan)


def test_one_cell_for_every_run_of_blocks() -> None:
    cells = made_up_cells()
    assert {(cell.n, cell.start) for cell in cells} == {(n, start) for n in range(1, 12) for start in range(13 - n)}
    matrix = distances().angular_mean_LN
    assert all(cell.value == matrix[cell.n - 1][cell.start] for cell in cells)


def test_cells_fill_the_plot_with_single_blocks_at_the_bottom() -> None:
    plot = axes()
    draw_heat(plot, distances().angular_mean_LN, None)
    corners = [patch.get_xy() for patch in plot.patches if isinstance(patch, Rectangle)]
    assert corners == [(cell.start, cell.n) for cell in heat_cells(distances().angular_mean_LN, None)]
    assert (plot.get_xlim(), plot.get_ylim()) == ((0, 12), (1, 12))


def test_the_cut_is_marked_where_the_plan_made_it() -> None:
    assert [(cell.start, cell.n) for cell in made_up_cells() if cell.chosen] == [(3, 4)]
    plot = axes()
    draw_heat(plot, distances().angular_mean_LN, report_data().plan)
    frames = [patch.get_xy() for patch in plot.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert frames == [(3, 4)] * 2
    other = Plan(num_blocks=12, keep_blocks=(0, 2, 4))
    assert not any(cell.chosen for cell in heat_cells(distances().angular_mean_LN, other))


def test_the_first_smallest_distance_of_each_row_is_marked() -> None:
    rows = ((0.4, 0.2, 0.2, 0.3), (0.5, 0.4, 0.6), (0.7, 0.6))
    lowest = [(cell.n, cell.start) for cell in heat_cells(rows, None) if cell.lowest]
    assert lowest == [(1, 1), (2, 1), (3, 1)]


def test_larger_distances_are_darker_and_every_figure_is_readable() -> None:
    cells = sorted(made_up_cells(), key=lambda cell: cell.value)
    shades = [luminance(cell.color) for cell in cells]
    assert shades == sorted(shades, reverse=True)
    assert min(contrast(cell.color, cell.ink) for cell in cells) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 2, 12, 32, 126])
def test_labels_of_the_block_axis_stay_few(num_blocks: int) -> None:
    ticks = few_of(0, num_blocks - 1)
    assert 1 <= len(ticks) <= 16
    assert ticks[0] == 0
    plot = axes()
    draw_heat(plot, distances(ADJACENT[:1] * num_blocks).angular_mean_LN, None)
    assert list(plot.get_xticks()) == [tick + 0.5 for tick in ticks]


def test_a_model_of_one_block_has_an_empty_map() -> None:
    assert heat_cells((), None) == []
    one = ReportData(name="x", distances=distances((0.2,)))
    assert "Which blocks went" in render(one)


def test_influence_bars_start_at_zero_and_keep_proportion() -> None:
    plot = axes()
    draw_influence(plot, distances(), report_data().plan)
    values = distances().block_influence_L
    bars = [
        patch for patch in plot.patches if isinstance(patch, Rectangle) and patch.get_width() == pytest.approx(0.72)
    ]
    assert [bool(bar.get_hatch()) for bar in bars] == [3 <= block < 7 for block in range(12)]
    assert [bar.get_height() for bar in bars] == pytest.approx(list(values))
    assert {bar.get_y() for bar in bars} == {0}
    assert plot.get_ylim()[0] == 0
    assert plot.get_ylim()[1] >= max(values)


def test_recovery_bars_keep_proportion_and_the_whole_is_the_teacher() -> None:
    chart = recovery_chart(report_data())
    assert chart is not None
    assert {tuple(lane.model for lane in row.lanes) for _, rows in chart.groups for row in rows} == {
        ("pruned", "sft", "sdft")
    }
    assert [(name, [row.name for row in rows]) for name, rows in chart.groups] == [
        ("Tuned families", ["word_problems", "lists", "ordering", "mean"]),
        ("Off-domain", ["facts", "myths", "scripts", "pronouns", "mean"]),
        ("All families", ["mean"]),
    ]
    lane, whole = chart.groups[0][1][0].lanes[2], chart.axis.place(1.0)
    assert lane.value is not None
    assert chart.axis.mark == 1
    assert chart.axis.place(lane.value) == pytest.approx(whole * 0.88 / 0.975)
    ratio = report_data().recovery["sdft"].tasks["word_problems"]
    assert lane.low is not None
    assert lane.high is not None
    assert ratio.stderr is not None
    assert chart.axis.place(lane.high) - chart.axis.place(lane.low) == pytest.approx(2 * whole * ratio.stderr)
    assert chart.axis.place(chart.axis.ticks[0]) == 0


def test_the_recovery_axis_grows_beyond_the_teacher() -> None:
    data = report_data()
    better = replace(data.recovery["sdft"], mean=Estimate(1.3, 0.1))
    chart = recovery_chart(data.model_copy(update={"recovery": {"sdft": better}}))
    assert chart is not None
    assert chart.labels == ("0", "25", "50", "75", "100", "125", "150 %")
    assert chart.axis.place(1.0) == pytest.approx(200 / 3)


def test_an_unknown_recovery_leaves_its_lane_empty() -> None:
    data = report_data()
    unknown = replace(data.recovery["sdft"], tasks={"facts": Estimate(None)})
    chart = recovery_chart(data.model_copy(update={"recovery": {"sdft": unknown}}))
    assert chart is not None
    assert [row.lanes[0].text for _, rows in chart.groups[:2] for row in rows if not row.strong] == ["–"] * 7


def test_loss_axes_start_at_zero() -> None:
    losses, rates = axes(), axes()
    curves = {name: thinned(points) for name, points in report_data().loss_curves.items()}
    draw_losses(losses, rates, curves, {"sft": "#d55e00", "sdft": "#0072b2"})
    assert losses.get_xlim() == rates.get_xlim() == (0, 120)
    assert (losses.get_ylim()[0], rates.get_ylim()[0], rates.get_xticks()[0]) == (0, 0, 0)
    raw = next(line for line in losses.lines if line.get_color() == "#d55e00" and line.get_alpha() == 0.35)
    points = report_data().loss_curves["sft"]
    assert np.asarray(raw.get_xydata()).tolist() == [[point.step, point.loss] for point in points]


def test_long_loss_curves_are_averaged_in_bins() -> None:
    points = thinned([LossPoint(step, float(step % 2), 1.0) for step in range(1, 10_001)])
    assert len(points) == MAX_POINTS
    assert points[-1].step == 10_000
    assert np.mean([point.loss for point in points]) == pytest.approx(0.5, abs=0.001)


def test_a_curve_of_one_point_can_be_drawn() -> None:
    data = report_data().model_copy(update={"loss_curves": {"sft": (LossPoint(0, 0.0, 0.0),)}})
    figure = loss_figure(data, {"sft": "arm0"})
    assert figure is not None
    assert figure.ends == {"sft": 0}


def test_svg_takes_the_colours_of_the_page_and_runs_nothing() -> None:
    found = loss_figure(report_data(), {"sft": "arm0", "sdft": "arm1"})
    assert found is not None
    assert set(re.findall(r"var\(--(\w+)\)", found.svg)) >= {"arm0", "arm1", "line", "soft"}
    assert not re.search(r"<style|<script|<metadata|<!--|http", found.svg)
    assert found == loss_figure(report_data(), {"sft": "arm0", "sdft": "arm1"})
    evil = "</title><script>x</script>"
    hostile = report_data().model_copy(update={"loss_curves": {evil: report_data().loss_curves["sft"]}})
    assert "<script" not in (loss_figure(hostile, {evil: "arm0"}) or found).svg


def test_smoothing_is_a_centred_mean() -> None:
    values = np.random.default_rng(0).normal(size=200)
    kernel = np.ones(11) / 11
    inner = np.convolve(values, kernel, mode="valid")
    result = smoothed(values.tolist())
    assert result[5:-5] == pytest.approx(inner.tolist())
    assert (result[0], result[-1]) == (values[0], values[-1])
    assert smoothed([1.0, 2.0, 3.0]) == pytest.approx([1.0, 2.0, 3.0])
