"""Render models side by side as one self-contained HTML page, in the look of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.evaluation.capabilities import OTHER
from sdft_ray.report.comparison import words as words
from sdft_ray.report.comparison.examples import example_groups
from sdft_ray.report.comparison.model import KINDS, Answers, Change, Comparison, Flips, Kind, Row, TaskRow
from sdft_ray.report.run.blocks_figure import Tick
from sdft_ray.report.toolbox.html import NUM_TONES, environment
from sdft_ray.report.toolbox.numbers import nice_ticks, number, p_words, points

MAX_TILES = 6


def render(comparison: Comparison) -> str:
    """The page. Sections without figures are left out; every text is escaped."""
    return environment().get_template("compare.html.j2").render(_context(comparison))


def _context(comparison: Comparison) -> dict[str, object]:
    return {
        "data": comparison,
        "tones": _tones(comparison),
        "title": " · ".join(model.name for model in comparison.models),
        "created": max(model.created for model in comparison.models),
        "runs": list(dict.fromkeys(model.run for model in comparison.models)),
        "verdict": words.verdict(comparison),
        "details": [words.details(comparison, place) for place in range(len(comparison.others))],
        "note": words.NOTE,
        "clear_note": words.clear_note(),
        "level": words.level(comparison),
        "tiles": tiles(comparison),
        "chart": changes_chart(comparison),
        "score_groups": score_groups(comparison),
        "flips": flip_tables(comparison),
        "answers": answer_groups(comparison),
        "missing": words.missing_answers(comparison),
        "examples": example_groups(comparison),
    }


def _tones(comparison: Comparison) -> dict[str, str]:
    """The baseline in ink, the first pruned model beside it in grey, all others in colours."""
    tones = {comparison.baseline.name: "teacher"}
    for model in comparison.others:
        free = model.role == "pruned" and "pruned" not in tones.values()
        tones[model.name] = "pruned" if free else f"arm{sum(t.startswith('arm') for t in tones.values()) % NUM_TONES}"
    return tones


@dataclass(frozen=True)
class Tile:
    """A mean difference at the top of the page."""

    label: str
    figure: str
    note: str


def tiles(comparison: Comparison) -> list[Tile]:
    """Generation and multiple choice apart; none where there would be too many, or nothing to tell apart."""
    if len(comparison.means) < 2 or len(comparison.means) * len(comparison.others) > MAX_TILES:
        return []
    return [
        Tile(
            f"{model.name}, {_kind_name(row).lower()}",
            points(row.changes[place].value),
            f"points, {words.interval(row.changes[place])}".removesuffix(", "),
        )
        for place, model in enumerate(comparison.others)
        for row in comparison.means
    ]


def _kind_name(row: Row) -> str:
    return next((name for kind, name in KINDS.items() if kind == row.name), row.name)


# --- the chart of differences -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """One model in one row: a dot, and a whisker over its interval. Places are per cent of the plot's width."""

    model: str
    at: float
    low: float | None
    high: float | None
    figure: str
    text: str


@dataclass(frozen=True)
class DotRow:
    name: str
    dots: tuple[Dot, ...]
    strong: bool = False


@dataclass(frozen=True)
class DotGroup:
    name: str
    rows: tuple[DotRow, ...]


@dataclass(frozen=True)
class DotChart:
    """Groups of rows over one axis of points; `zero` is where there is no difference."""

    groups: tuple[DotGroup, ...]
    ticks: tuple[Tick, ...]
    zero: float


def changes_chart(comparison: Comparison) -> DotChart | None:
    """Differences of tasks, kind by kind, then of means; None where no score is a share of right answers."""
    parts: list[tuple[str, list[tuple[str, Row]]]] = [
        (KINDS[kind], [(task.name, task) for task in tasks])
        for kind, tasks in comparison.kinds.items()
        if kind != "other"
    ]
    parts.append(("Means", _means(comparison)))
    rows = [row for _, part in parts for _, row in part]
    if not rows:
        return None
    ends = [end for row in rows for change in row.changes for end in (change.value, change.low, change.high)]
    ticks = axis([end for end in ends if end is not None])
    start, span = ticks[0], ticks[-1] - ticks[0]

    def at(value: float) -> float:
        return 100 * (value - start) / span

    def dot(model: str, change: Change) -> Dot:
        low, high = (None if end is None else at(end) for end in (change.low, change.high))
        ends = words.interval(change)
        figure = words.difference(change)
        return Dot(model, at(change.value), low, high, figure, f"{figure} ({ends})" if ends else figure)

    groups = []
    for name, part in parts:
        drawn = [
            DotRow(title, tuple(map(dot, [m.name for m in comparison.others], row.changes)), strong=name == "Means")
            for title, row in part
        ]
        groups.append(DotGroup(name, tuple(drawn)))
    marks = tuple(Tick(at(tick), points(tick, 0)) for tick in ticks)
    return DotChart(tuple(group for group in groups if group.rows), marks, at(0.0))


def _means(comparison: Comparison) -> list[tuple[str, Row]]:
    """Named as under a heading of that name."""
    return [(name.removeprefix("mean, ").removeprefix("mean of "), row) for name, row in words.mean_rows(comparison)]


def axis(values: Sequence[float]) -> list[float]:
    """Round ticks that hold all values and 0, in fractions; at least 2 points wide."""
    low, high = min(0.0, *values), max(0.0, *values)
    step = nice_ticks(max(high - low, 0.02))[1]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = -1, 1
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


# --- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreCell:
    """A score, and for all but the baseline the difference with its interval."""

    score: str
    error: str
    change: str = ""
    interval: str = ""
    tone: str = ""


@dataclass(frozen=True)
class ScoreLine:
    name: str
    note: str
    cells: tuple[ScoreCell, ...]
    strong: bool = False


@dataclass(frozen=True)
class ScoreGroup:
    name: str
    lines: tuple[ScoreLine, ...]


def score_groups(comparison: Comparison) -> list[ScoreGroup]:
    """Tasks by kind, then means."""
    groups = []
    for kind, tasks in comparison.kinds.items():
        lines = [ScoreLine(task.name, _task_note(task), _score_cells(task, kind)) for task in tasks]
        groups.append(ScoreGroup(KINDS[kind], tuple(lines)))
    means = [ScoreLine(name, "", _score_cells(row, "choice"), strong=True) for name, row in _means(comparison)]
    return [group for group in (*groups, ScoreGroup("Means", tuple(means))) if group.lines]


def _task_note(task: TaskRow) -> str:
    """commonsense, acc, 200 items, 5-shot."""
    shots = [f"{task.num_fewshot}-shot"] if task.num_fewshot else []
    capability = [task.capability] if task.capability != OTHER else []
    return ", ".join([*capability, task.metric, f"{task.num_items:,} items", *shots])


def _score_cells(row: Row, kind: Kind) -> tuple[ScoreCell, ...]:
    cells = []
    for place, figure in enumerate(row.scores):
        value, error = words.score(figure, kind=kind)
        if not place:
            cells.append(ScoreCell(value, error))
            continue
        change = row.changes[place - 1]
        tone = ("up" if change.value > 0 else "down") if change.is_clear else ""
        told = words.difference(change, kind=kind), words.interval(change, kind=kind)
        cells.append(ScoreCell(value, error, *told, tone))
    return tuple(cells)


@dataclass(frozen=True)
class FlipLine:
    """Counts of a task's items; `lost` and `won` also as shares of all, for the bars."""

    task: str
    both: str
    lost: str
    won: str
    neither: str
    p: str
    lost_share: float
    won_share: float
    clear: bool


@dataclass(frozen=True)
class FlipTable:
    model: str
    lines: tuple[FlipLine, ...]
    num_lost: str
    num_won: str


def flip_tables(comparison: Comparison) -> list[FlipTable]:
    """For each other model the tasks whose items are right or wrong; models without such tasks are left out."""
    tables = []
    for place, model in enumerate(comparison.others):
        changes = [(task.name, task.changes[place]) for task in comparison.tasks]
        flips = [change.flips for _, change in changes if change.flips is not None]
        lines = [_flip_line(name, change.flips, change.is_clear) for name, change in changes if change.flips]
        num_lost, num_won = sum(f.num_only_baseline for f in flips), sum(f.num_only_other for f in flips)
        if lines:
            tables.append(FlipTable(model.name, tuple(lines), f"{num_lost:,}", f"{num_won:,}"))
    return tables


def _flip_line(task: str, flips: Flips, clear: bool) -> FlipLine:
    num = flips.num_both + flips.num_only_baseline + flips.num_only_other + flips.num_neither
    return FlipLine(
        task=task,
        both=f"{flips.num_both:,}",
        lost=f"{flips.num_only_baseline:,}",
        won=f"{flips.num_only_other:,}",
        neither=f"{flips.num_neither:,}",
        p=p_words(flips.p_value),
        lost_share=flips.num_only_baseline / num,
        won_share=flips.num_only_other / num,
        clear=clear,
    )


@dataclass(frozen=True)
class AnswerLine:
    model: str
    right: str
    wrong: str
    no_answer: str
    truncated: str
    mean_tokens: str


def answer_groups(comparison: Comparison) -> list[tuple[str, list[AnswerLine]]]:
    """Generation tasks with how each model's answers look; empty where nothing was kept."""
    groups = []
    for task in comparison.tasks:
        pairs = zip(comparison.models, task.answers, strict=True)
        lines = [_answer_line(model.name, answers) for model, answers in pairs if answers is not None]
        if lines:
            groups.append((task.name, lines))
    return groups


def _answer_line(model: str, found: Answers) -> AnswerLine:
    return AnswerLine(
        model=model,
        right=f"{found.num_right:,}",
        wrong=f"{found.num_wrong:,}",
        no_answer=f"{found.num_no_answer:,}",
        truncated="–" if found.num_truncated is None else f"{found.num_truncated:,}",
        mean_tokens="–" if found.mean_tokens is None else number(found.mean_tokens, 1),
    )
