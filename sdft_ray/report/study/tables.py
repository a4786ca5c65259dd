"""The tables of a study: for its page, for a terminal, and as Markdown for a README. Loads neither numpy nor jinja."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sdft_ray.report.study.model import ALL, OFF_DOMAIN, Fit, Panel, Pruned, StudyData
from sdft_ray.report.study.model import Cell as Students
from sdft_ray.report.study.words import bounds, cells_compared, fit_words, rows
from sdft_ray.report.toolbox.markdown import code
from sdft_ray.report.toolbox.numbers import points, rate
from sdft_ray.report.toolbox.table import DASH, Cell, Group, Row, Table, for_markdown, names, share
from sdft_ray.statistics.estimate import Estimate


def recovery_table(panel: Panel, sizes: Sequence[int], with_bounds: Sequence[int]) -> Table:
    """For a terminal: arms by training rows, over all tasks."""
    best = max(cells_compared(panel), key=lambda cell: cell.recovery[ALL].known).arm
    shown = []
    for arm in panel.arms:
        cells = [Cell(share(panel.pruned_of(arm).recovery[ALL]), tone="soft")]
        for size in sizes:
            result = panel.cell(arm, size)
            text = share(result.recovery[ALL].known) if result else DASH
            cells.append(Cell(text, bounds(result.recovery[ALL]).strip() if result and size in with_bounds else ""))
        shown.append(Row(Cell(arm, tone="best" if arm == best else ""), tuple(cells)))
    titles = (rows(size) if size == sizes[-1] else f"{size:,}" for size in sizes)
    return Table("", names("", Cell("pruned", tone="soft"), *titles), (Group("", tuple(shown)),))


# --- the page -----------------------------------------------------------------------------------------------


def score_tables(panel: Panel, tones: Mapping[str, str]) -> list[Table]:
    """Scores at the largest size; then, where there are several, recovery by group of tasks, and [-1] all sizes."""
    largest = cells_compared(panel)
    seeds = sorted({cell.num_seeds for cell in largest})
    several = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}"
    title = f"{rows(largest[0].num_rows)}, {several}"
    whole = (Group("", tuple(_baselines(panel)), "models"), Group(title, _arms(panel, largest, tones)))
    tables = [_scores(panel, f"Scores at the largest size, {panel.name}", whole)]
    tables += [_by_group(panel, largest, tones)] if len(panel.groups) > 1 else []
    return tables


def all_sizes(panel: Panel, tones: Mapping[str, str]) -> Table | None:
    """Scores at every size, the largest first; None where there is one size."""
    if len(panel.sizes) < 2:
        return None
    groups = (
        Group(rows(size), _arms(panel, [cell for cell in panel.cells if cell.num_rows == size], tones))
        for size in reversed(panel.sizes)
    )
    return _scores(panel, f"Scores at every size, {panel.name}", tuple(groups))


def _scores(panel: Panel, caption: str, groups: tuple[Group, ...]) -> Table:
    spanning = ()
    if len(panel.groups) > 1:
        widths = len(panel.tuned), len(panel.tasks) - len(panel.tuned)
        spanning = (Cell(), Cell("tuned", span=widths[0]), Cell("off-domain", span=widths[1]), Cell(span=4))
    last = ("average", "recovery", f"against {panel.arms[0]}", "learning rate")
    return Table(caption, names("Model", *panel.tasks, *last), groups, "study-table", spanning)


def _baselines(panel: Panel) -> Iterator[Row]:
    teacher = [*(share(panel.teacher[task]) for task in panel.tasks), share(panel.teacher_average)]
    yield Row(Cell("teacher", swatch="teacher"), names(*teacher, "100.0", DASH, DASH))
    for pruned in panel.pruned:
        scores = [*(share(pruned.scores[task]) for task in panel.tasks), share(pruned.average)]
        yield Row(_pruned(panel, pruned), names(*scores, share(pruned.recovery[ALL]), DASH, DASH))


def _pruned(panel: Panel, pruned: Pruned) -> Cell:
    return Cell("pruned alone", f"of {', '.join(pruned.arms)}" if len(panel.pruned) > 1 else "", swatch="pruned")


def _arms(panel: Panel, cells: Sequence[Students], tones: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(
        Row(
            Cell(cell.arm, swatch=tones[cell.arm]),
            (
                *(_score(cell, task) for task in panel.tasks),
                Cell(share(cell.average)),
                _figure(cell.recovery[ALL]),
                _against(cell, ALL),
                Cell(", ".join(map(rate, cell.learning_rates))),
            ),
        )
        for cell in cells
    )


def _score(cell: Students, task: str) -> Cell:
    return Cell(share(cell.scores[task]), f"± {share(cell.margins[task])}" if task in cell.margins else "")


def _figure(result: Estimate, *, sign: bool = False, tone: str = "") -> Cell:
    """Differences and gains have a sign; the rest are shares of the teacher."""
    form = points if sign else share
    ends = f"{form(result.low)} to {form(result.high)}" if result.low is not None and result.high is not None else ""
    return Cell(form(result.known), ends, tone)


def _against(cell: Students, group: str) -> Cell:
    ahead = cell.ahead.get(group)
    return Cell(DASH) if ahead is None else _figure(ahead, sign=True, tone="clear" if ahead.is_clear else "")


def _by_group(panel: Panel, largest: Sequence[Students], tones: Mapping[str, str]) -> Table:
    parts = [group for group in panel.groups if group != ALL]
    baselines = tuple(
        Row(
            _pruned(panel, pruned),
            tuple(cell for group in parts for cell in names(share(pruned.recovery[group]), DASH)),
        )
        for pruned in panel.pruned
    )
    arms = tuple(
        Row(
            Cell(cell.arm, swatch=tones[cell.arm]),
            tuple(part for group in parts for part in (_figure(cell.recovery[group]), _against(cell, group))),
        )
        for cell in largest
    )
    columns = (title for group in parts for title in (group, f"against {panel.arms[0]}"))
    return Table(
        f"Recovery of tuned tasks and off-domain, {panel.name}",
        names(f"Recovery at {rows(largest[0].num_rows)}", *columns),
        (Group("", baselines, "models"), Group("", arms)),
        "study-table",
    )


def more_table(study: StudyData, group: str, tones: Mapping[str, str]) -> Table:
    """What more rows would add to each arm, over one group of tasks."""
    fits = (fit for panel in study.panels for fit in panel.fits.values())
    factors = sorted(dict.fromkeys(more.factor for fit in fits for more in fit.more))
    groups = (
        Group(
            panel.name,
            tuple(row for arm in panel.arms for row in _more(panel, arm, group, len(factors) + 2, tones[arm])),
        )
        for panel in study.panels
        if group in panel.groups
    )
    columns = ("Arm", "fitted at the largest size", *(f"{factor:g} × the rows" for factor in factors), "endless rows")
    caption = f"What more training rows would buy, {group}"
    return Table(caption, names(*columns), tuple(groups), "study-table more-table")


def _more(panel: Panel, arm: str, group: str, width: int, tone: str) -> Iterator[Row]:
    """Known figures, then why others are missing; below, what else should be known of the curve."""
    fit: Fit = panel.fits[arm, group]
    largest = max(cell.num_rows for cell in panel.cells if cell.arm == arm)
    now = next((point for point in fit.line if point.num_rows == largest), None)
    cells = []
    if now is not None:
        cells = [_figure(Estimate(now.value, low=now.low, high=now.high))]
        cells += [_figure(more.gain, sign=True) for more in fit.more if more.gain is not None]
        cells += [_figure(fit.asymptote)] if fit.asymptote is not None else []
    missing = fit_words(fit) if fit.asymptote is None else ""
    below = "" if missing else fit.note
    if missing:
        cells.append(Cell(missing, kind="reason", span=width - len(cells)))
    yield Row(Cell(arm, swatch=tone), tuple(cells), tone="noted" if below else "")
    if below:
        yield Row(Cell(), (Cell(below, kind="reason", span=width),))


# --- Markdown -----------------------------------------------------------------------------------------------


def study_markdown(study: StudyData) -> str:
    """One table for all panels as in the papers, each under a line with its name; in per cent, with 95 % intervals.

    What is compared stands first, where a narrow page still shows it. Raises `ValueError` for a study without panels.
    """
    if not study.panels:
        raise ValueError("a study without panels has no table")
    tasks = tuple(dict.fromkeys(task for panel in study.panels for task in panel.tasks))
    apart = any(OFF_DOMAIN in panel.groups for panel in study.panels)
    columns = ["", "recovery", f"against {study.panels[0].arms[0]}", *(["off-domain recovery"] if apart else [])]
    groups, teacher = [], {}
    for panel in study.panels:
        if panel.teacher != teacher:
            teacher = panel.teacher
            shares = ["100", "", *(["100"] if apart else []), share(panel.teacher_average)]
            groups.append(Group("", (Row(Cell("teacher"), (*names(*shares), *_markdown_scores(tasks, teacher))),)))
        title = f"{panel.name}, {rows(cells_compared(panel)[0].num_rows)}"
        groups.append(Group(title, tuple(_markdown_rows(panel, tasks, apart=apart))))
    return for_markdown(Table("", names(*columns, "average", *map(code, tasks)), tuple(groups)))


def _markdown_rows(panel: Panel, tasks: Sequence[str], *, apart: bool) -> Iterator[Row]:
    compared = cells_compared(panel)
    for pruned in panel.pruned:
        whose = f" ({', '.join(pruned.arms)})" if len(panel.pruned) > 1 else ""
        cells = [share(pruned.recovery[ALL]), ""]
        if apart:
            cells.append(share(pruned.recovery[OFF_DOMAIN]) if OFF_DOMAIN in pruned.recovery else "")
        scores = _markdown_scores(tasks, pruned.scores)
        yield Row(Cell(f"pruned{whose}"), (*names(*cells, share(pruned.average)), *scores))
    best = share(max(cell.recovery[ALL].known for cell in compared))
    for cell in compared:
        recovery = _bounded(cell.recovery[ALL])
        ahead = cell.ahead.get(ALL)
        result = [Cell(recovery.text, recovery.note, tone="best" if recovery.text == best else "")]
        result.append(Cell(points(ahead.known), bounds(ahead, sign=True).strip()) if ahead else Cell())
        if apart:
            result.append(_bounded(cell.recovery[OFF_DOMAIN]) if OFF_DOMAIN in cell.recovery else Cell())
        scores = _markdown_scores(tasks, cell.scores, cell.margins)
        yield Row(Cell(cell.arm), (*result, Cell(share(cell.average)), *scores))


def _bounded(result: Estimate) -> Cell:
    return Cell(share(result.known), bounds(result).strip())


def _markdown_scores(
    tasks: Sequence[str], scores: Mapping[str, float], margins: Mapping[str, float] | None = None
) -> tuple[Cell, ...]:
    notes = {task: f"± {share(margin)}" for task, margin in (margins or {}).items()}
    return tuple(Cell(share(scores[t]), notes.get(t, "")) if t in scores else Cell(DASH) for t in tasks)
