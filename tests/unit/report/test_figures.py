"""Geometry of the figures: where cells, bars and lines stand."""

from __future__ import annotations

import numpy as np
import pytest

from sdft_ray.report.run.blocks_figure import Cell, block_ticks, heat_map, influence
from sdft_ray.report.run.charts import MAX_POINTS, loss_chart, recovery_chart, smoothed
from sdft_ray.report.run.model import LossPoint, Plan, Ratio
from tests.unit.report.made_up import distances, report_data


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it; of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    srgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def made_up_cells() -> tuple[Cell, ...]:
    return heat_map(distances().angular_mean, report_data().plan).cells


def test_one_cell_for_every_run_of_blocks() -> None:
    cells = made_up_cells()
    assert {(cell.n, cell.start) for cell in cells} == {(n, start) for n in range(1, 12) for start in range(13 - n)}
    matrix = distances().angular_mean
    assert all(cell.value == matrix[cell.n - 1][cell.start] for cell in cells)


def test_cells_fill_the_plot_with_single_blocks_at_the_bottom() -> None:
    figure = heat_map(distances().angular_mean, None)
    corners = {(cell.start, cell.n): (cell.x, cell.y) for cell in figure.cells}
    assert corners[0, 1] == pytest.approx((0, 100 - 100 / 11))
    assert corners[11, 1] == pytest.approx((1100 / 12, 100 - 100 / 11))
    assert corners[0, 11] == pytest.approx((0, 0), abs=1e-9)


def test_the_cut_is_marked_where_the_plan_made_it() -> None:
    figure = heat_map(distances().angular_mean, report_data().plan)
    assert figure.chosen is not None
    assert (figure.chosen.start, figure.chosen.n) == (3, 4)
    assert heat_map(distances().angular_mean, Plan(num_blocks=12, keep_blocks=(0, 2, 4))).chosen is None


def test_the_first_smallest_distance_of_each_row_is_marked() -> None:
    rows = ((0.4, 0.2, 0.2, 0.3), (0.5, 0.4, 0.6), (0.7, 0.6))
    lowest = [(cell.n, cell.start) for cell in heat_map(rows, None).cells if cell.lowest]
    assert lowest == [(1, 1), (2, 1), (3, 1)]


def test_larger_distances_are_darker_and_every_figure_is_readable() -> None:
    cells = sorted(made_up_cells(), key=lambda cell: cell.value)
    shades = [luminance(cell.color) for cell in cells]
    assert shades == sorted(shades, reverse=True)
    assert min(contrast(cell.color, cell.ink) for cell in cells) >= 4.5


@pytest.mark.parametrize("num_blocks", [1, 2, 12, 32, 126])
def test_labels_of_the_block_axis_stay_few(num_blocks: int) -> None:
    ticks = block_ticks(num_blocks)
    assert 1 <= len(ticks) <= 16
    assert ticks[0].label == "0"
    assert ticks[0].at == pytest.approx(50 / num_blocks)


def test_a_model_of_one_block_has_an_empty_map() -> None:
    assert heat_map((), None).cells == ()


def test_influence_bars_start_at_zero_and_keep_proportion() -> None:
    figure = influence(distances(), report_data().plan)
    values = distances().block_influence
    assert [bar.removed for bar in figure.bars] == [3 <= block < 7 for block in range(12)]
    per_unit = [bar.height / value for bar, value in zip(figure.bars, values, strict=True)]
    assert per_unit == pytest.approx([per_unit[0]] * 12)
    assert max(bar.height for bar in figure.bars) <= 100
    assert [tick.at for tick in figure.ticks][0::2] == [100, 0]


def test_recovery_bars_keep_proportion_and_the_whole_is_the_teacher() -> None:
    chart = recovery_chart(report_data())
    assert chart is not None
    assert chart.models == ("pruned", "sft", "sdft")
    assert [(group.name, [row.name for row in group.rows]) for group in chart.groups] == [
        ("Tuned families", ["word_problems", "lists", "ordering", "mean"]),
        ("Off-domain", ["facts", "myths", "scripts", "pronouns", "mean"]),
        ("All families", ["mean"]),
    ]
    lane = chart.groups[0].rows[0].lanes[2]
    assert lane.value == pytest.approx(chart.whole * 0.88 / 0.975)
    ratio = report_data().recovery["sdft"].tasks["word_problems"]
    assert lane.low is not None
    assert lane.high is not None
    assert ratio.stderr is not None
    assert lane.high - lane.low == pytest.approx(2 * chart.whole * ratio.stderr)
    assert chart.ticks[0].at == 0


def test_the_recovery_axis_grows_beyond_the_teacher() -> None:
    data = report_data()
    better = data.recovery["sdft"].model_copy(update={"mean": Ratio(value=1.3, stderr=0.1)})
    chart = recovery_chart(data.model_copy(update={"recovery": {"sdft": better}}))
    assert chart is not None
    assert [tick.label for tick in chart.ticks] == ["0", "25", "50", "75", "100", "125", "150"]
    assert chart.whole == pytest.approx(200 / 3)


def test_an_unknown_recovery_leaves_its_lane_empty() -> None:
    data = report_data()
    unknown = data.recovery["sdft"].model_copy(update={"tasks": {"facts": Ratio(value=None)}})
    chart = recovery_chart(data.model_copy(update={"recovery": {"sdft": unknown}}))
    assert chart is not None
    assert [row.lanes[0].text for group in chart.groups[:2] for row in group.rows if not row.strong] == ["–"] * 7


def test_loss_axes_start_at_zero() -> None:
    chart = loss_chart(report_data())
    assert chart is not None
    assert (chart.x_ticks[0].at, chart.x_ticks[0].label) == (0, "0")
    assert (chart.y_ticks[0].at, chart.y_ticks[0].label) == (100, "0")
    top = float(chart.y_ticks[-1].label)
    first = report_data().loss_curves["sft"][0]
    x, y = (float(part) for part in chart.curves[0].raw.split()[0].split(","))
    assert (x, y) == pytest.approx((1000 / 120, 1000 - 1000 * first.loss / top), abs=0.06)


def test_long_loss_curves_are_averaged_in_bins() -> None:
    points = tuple(LossPoint(step, float(step % 2), 1.0) for step in range(1, 10_001))
    chart = loss_chart(report_data().model_copy(update={"loss_curves": {"sft": points}}))
    assert chart is not None
    drawn = [tuple(map(float, pair.split(","))) for pair in chart.curves[0].raw.split()]
    assert len(drawn) == MAX_POINTS
    assert drawn[-1][0] == 1000
    top = float(chart.y_ticks[-1].label)
    assert np.mean([y for _, y in drawn]) == pytest.approx(1000 - 1000 * 0.5 / top, abs=0.1)


def test_a_curve_of_one_point_can_be_drawn() -> None:
    chart = loss_chart(report_data().model_copy(update={"loss_curves": {"sft": (LossPoint(0, 0.0, 0.0),)}}))
    assert chart is not None
    assert chart.curves[0].last == 0


def test_smoothing_is_a_centred_mean() -> None:
    values = np.random.default_rng(0).normal(size=200)
    kernel = np.ones(11) / 11
    inner = np.convolve(values, kernel, mode="valid")
    result = smoothed(values.tolist())
    assert result[5:-5] == pytest.approx(inner.tolist())
    assert (result[0], result[-1]) == (values[0], values[-1])
    assert smoothed([1.0, 2.0, 3.0]) == pytest.approx([1.0, 2.0, 3.0])
