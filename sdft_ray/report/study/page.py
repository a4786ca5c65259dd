"""A study as one self-contained HTML page, in the look of a run's report: no script, nothing fetched."""

from __future__ import annotations

from sdft_ray.report.study import tables
from sdft_ray.report.study.figures import small_plots
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, TUNED, StudyData
from sdft_ray.report.study.words import rows, verdict
from sdft_ray.report.toolbox.html import NUM_TONES, environment


def render_study(study: StudyData) -> str:
    """The page. Sections without data are left out; every text is escaped."""
    return environment().get_template("study.html.j2").render(_context(study))


def _context(study: StudyData) -> dict[str, object]:
    tones = {arm: f"arm{i % NUM_TONES}" for i, arm in enumerate(study.arms)}

    groups = {group for panel in study.panels for group in panel.groups}
    cells = [cell for panel in study.panels for cell in panel.cells]
    return {
        "study": study,
        "tones": tones,
        "findings": [(panel.name, verdict(panel)) for panel in study.panels],
        "curves": [(panel, small_plots(study, panel)) for panel in study.panels],
        "scores": [
            (panel.name, tables.score_tables(panel, tones), tables.all_sizes(panel, tones)) for panel in study.panels
        ],
        "more": [
            ("off-domain tasks" if group == OFF_DOMAIN else group, tables.more_table(study, group, tones))
            for group in (ALL, TUNED, OFF_DOMAIN)
            if group in groups
        ],
        "tiles": _tiles(study),
        "one_seed": max((cell.num_seeds for cell in cells), default=0) == 1,
    }


def _tiles(study: StudyData) -> list[tuple[str, str, str]]:
    """How large the study is: label, figure, note."""
    if not study.panels:
        return []
    cells = [cell for panel in study.panels for cell in panel.cells]
    sizes = sorted({cell.num_rows for cell in cells})
    seeds = max(cell.num_seeds for cell in cells)
    return [
        ("students", f"{study.num_students:,}", f"{len(study.arms)} arms, {seeds} seed{'s' * (seeds > 1)} each"),
        ("data-set sizes", str(len(sizes)), f"{sizes[0]:,} to {rows(sizes[-1])}"),
        ("comparisons", str(len(study.panels)), "variants by removed blocks"),
        ("tasks", str(len({task for panel in study.panels for task in panel.tasks})), "the same items for all models"),
    ]
