"""Render a study as one self-contained HTML page, in the look of a run's report: no script, nothing fetched."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.report.study.charts import Level, Rows, SmallPlot, row_axis, small_plots
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, TUNED, Cell, Fit, Interval, Panel, StudyData
from sdft_ray.report.study.words import cells_compared, fit_words, rows, signed, verdict
from sdft_ray.report.toolbox.html import NUM_TONES, environment
from sdft_ray.report.toolbox.words import Words


@dataclass(frozen=True)
class MoreRow:
    """What more rows would buy one arm; `now` is None where there is no curve.

    `beside` says why figures are missing, `below` what else should be known of the curve.
    """

    arm: str
    fit: Fit
    now: Interval | None
    beside: str
    below: str


@dataclass(frozen=True)
class PanelView:
    """One panel as the page shows it."""

    panel: Panel
    verdict: list[Words]
    plots: tuple[SmallPlot, ...]
    more: dict[str, tuple[MoreRow, ...]]
    """By group."""
    largest: list[Cell]
    seeds: str


def render_study(study: StudyData) -> str:
    """The page. Sections without data are left out; every text is escaped."""
    return environment().get_template("study.html.j2").render(_context(study))


def _context(study: StudyData) -> dict[str, object]:
    tones = {arm: f"arm{i % NUM_TONES}" for i, arm in enumerate(study.arms)}

    def level_tone(level: Level, panel: Panel) -> str:
        """A pruned model of one arm alone has that arm's colour, the teacher and a common one their own."""
        if not level.arms:
            return "teacher"
        return tones[level.arms[0]] if len(level.arms) == 1 < len(panel.arms) else "pruned"

    axis = row_axis(study)
    groups = {group for panel in study.panels for group in panel.groups}
    return {
        "study": study,
        "tones": tones,
        "level_tone": level_tone,
        "views": [_view(panel, axis) for panel in study.panels],
        "factors": _factors(study),
        "all_tasks": ALL,
        "other_groups": [group for group in (TUNED, OFF_DOMAIN) if group in groups],
        "tiles": _tiles(study),
        "signed": signed,
        "rows_words": rows,
        "one_seed": max((cell.num_seeds for panel in study.panels for cell in panel.cells), default=0) == 1,
    }


def _view(panel: Panel, axis: Rows) -> PanelView:
    largest = cells_compared(panel)
    fewest, most = min(cell.num_seeds for cell in largest), max(cell.num_seeds for cell in largest)
    seeds = f"{most} seed{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} seeds"
    more = {group: tuple(_more(panel, arm, group) for arm in panel.arms) for group in panel.groups}
    return PanelView(panel, verdict(panel), small_plots(panel, axis), more, largest, seeds)


def _more(panel: Panel, arm: str, group: str) -> MoreRow:
    fit = panel.fits[arm, group]
    largest = max(cell.num_rows for cell in panel.cells if cell.arm == arm)
    now = next((Interval(p.value, p.low, p.high) for p in fit.line if p.num_rows == largest), None)
    missing = fit.asymptote is None
    return MoreRow(arm, fit, now, fit_words(fit) if missing else "", "" if missing else fit.note)


def _factors(study: StudyData) -> list[float]:
    found = (more.factor for panel in study.panels for fit in panel.fits.values() for more in fit.more)
    return sorted(dict.fromkeys(found))


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
