"""The report of a run as one self-contained HTML page: no script, nothing fetched, light and dark, screen and paper."""

from __future__ import annotations

from sdft_ray.report.run import figures, tables, words
from sdft_ray.report.run.cards import students
from sdft_ray.report.run.engines import engines_line, engines_warnings
from sdft_ray.report.run.model import PRUNED, TEACHER, ReportData, Sample
from sdft_ray.report.toolbox.diff import side_by_side
from sdft_ray.report.toolbox.html import NUM_TONES, environment

MAX_SAMPLES = 12
MAX_CHARACTERS = 3000
"""Longer texts of a sample are cut, and say so."""


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
        "verdict": words.verdict(data),
        "comparison": words.comparison(data.retention.lead),
        "released": words.released(data.retention),
        "warnings": [*words.warnings(data), *engines_warnings(data)],
        "tiles": words.tiles(data),
        "grouped": len(words.groups(data)) > 1,
        "recovery": figures.recovery_chart(data),
        "arm_notes": words.arm_notes(data),
        "worst": words.worst(data),
        "kept": students(data),
        "scores": tables.score_table(data, tones),
        "num_items": tables.num_items(data),
        "about_means": words.about_means(data),
        "sizes": tables.size_table(data),
        "speeds": tables.speed_tables(data),
        "loss": figures.loss_figure(data, tones),
        "cost_notes": words.cost_notes(data),
        "grids": tables.grid_tables(data, tones),
        "gap": tables.gap_table(data, tones),
        "correction": tables.correction_table(data),
        "forgetting": tables.forgetting_table(data, tones),
        "similarity": words.similarity(data),
        "rows_read": words.rows_read(data),
        "overlap": words.overlap(data),
        "selection": tables.selection_table(data),
        "samples": [_sample(sample) for sample in data.samples[:MAX_SAMPLES]],
        "stages": tables.stage_table(data),
        "engines": engines_line(data),
        "stages_sum": sum(stage.wall_s for stage in data.stages),
        **_blocks(data),
    }


def _sample(sample: Sample) -> dict[str, object]:
    """With what only the reference or only the rewrite has marked."""
    left, right = side_by_side(_cut(sample.reference), _cut(sample.distilled))
    return {**vars(sample), "instruction": _cut(sample.instruction), "left": left, "right": right}


def _cut(text: str) -> str:
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS:,} more characters)"


def _blocks(data: ReportData) -> dict[str, object]:
    """The distances at the position that the plan used with the influence bars, and the other ones for comparison."""
    removed = words.pruning_words(data)
    candidates = tables.candidate_table(data)
    if data.distances is None:
        return {"removed_words": removed, "candidates": candidates}
    positions = {False: "Angular distance at the last token", True: "Angular distance, mean over all tokens"}
    used = data.plan is not None and data.plan.position == "mean"
    first = f"{positions[used]}: {removed}"
    return {
        "removed_words": removed,
        "candidates": candidates,
        "heat_title": positions[used],
        "heat": figures.blocks_figure(first, data.distances, data.plan, mean=used, strip=True),
        "other_title": positions[not used],
        "other_heat": figures.blocks_figure(positions[not used], data.distances, data.plan, mean=not used, strip=False),
    }
