"""Render a report as one self-contained HTML page: no script, nothing fetched, light and dark, screen and paper."""

from __future__ import annotations

from sdft_ray.report.run import blocks_figure, charts, forgetting_table, grid_table, kept_table, rows
from sdft_ray.report.run.kept_words import released
from sdft_ray.report.run.model import PRUNED, TEACHER, ReportData
from sdft_ray.report.run.speeds import speed_tables
from sdft_ray.report.run.words import comparison, groups, overlap, verdict, warnings
from sdft_ray.report.toolbox.html import NUM_TONES, environment


def render(data: ReportData) -> str:
    """The page. Sections whose data are missing are left out; every text is escaped."""
    return environment().get_template("page.html.j2").render(_context(data))


def _context(data: ReportData) -> dict[str, object]:
    arms = data.arm_names
    tones = {TEACHER: "teacher", PRUNED: "pruned", **{arm: f"arm{i % NUM_TONES}" for i, arm in enumerate(arms)}}
    return {
        "data": data,
        "tones": tones,
        "teacher_name": "/".join(data.teacher_model.rstrip("/").split("/")[-2:]),
        "verdict": verdict(data),
        "comparison": comparison(data),
        "released": released(data.retention),
        "warnings": warnings(data),
        "tiles": rows.tiles(data),
        "grouped": len(groups(data)) > 1,
        "recovery": charts.recovery_chart(data),
        "arm_notes": rows.arm_notes(data),
        "worst": rows.worst(data),
        "kept": kept_table.students(data),
        "score_models": rows.score_models(data),
        "score_groups": rows.score_groups(data),
        "num_items": rows.num_items(data),
        "sizes": rows.size_rows(data),
        "speeds": speed_tables(data),
        "loss": charts.loss_chart(data),
        "cost_notes": rows.cost_notes(data),
        "grids": grid_table.grid_tables(data),
        "forgetting": forgetting_table.table(data),
        "overlap": overlap(data),
        "selection": rows.selection_rows(data),
        "samples": rows.sample_rows(data),
        "stages": rows.stage_rows(data),
        "stages_sum": sum(stage.wall_s for stage in data.stages),
        **_blocks(data),
    }


def _blocks(data: ReportData) -> dict[str, object]:
    """The heat map of the position that the plan used, the other one for comparison, and the influence bars."""
    context: dict[str, object] = {"removed_words": rows.pruning_words(data)}
    if data.distances is None:
        return context
    maps = [
        {"title": title, "map": blocks_figure.heat_map(matrix, data.plan)}
        for title, matrix in (
            ("Angular distance at the last token", data.distances.angular_last),
            ("Angular distance, mean over all tokens", data.distances.angular_mean),
        )
    ]
    if data.plan is not None and data.plan.position == "mean":
        maps.reverse()
    num_blocks = len(data.distances.block_influence)
    return context | {
        "heat_shown": maps[0],
        "heat_other": maps[1],
        "influence": blocks_figure.influence(data.distances, data.plan),
        "num_blocks": num_blocks,
        "block_marks": blocks_figure.block_ticks(num_blocks),
    }
