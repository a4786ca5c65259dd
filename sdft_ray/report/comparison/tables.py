"""The tables of models side by side, for the page and the terminal. Light: loads neither torch nor jinja."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sdft_ray.evaluation.capabilities import OTHER
from sdft_ray.report.comparison import words
from sdft_ray.report.comparison.model import KINDS, Answers, Change, Comparison, Flips, Kind, Row, TaskRow
from sdft_ray.report.toolbox import table
from sdft_ray.report.toolbox.numbers import number, p_words
from sdft_ray.report.toolbox.table import DASH, Cell, Group, Table, names


def score_table(comparison: Comparison, tones: Mapping[str, str]) -> Table:
    """For the page: tasks by kind, then means, each with the differences to the baseline."""
    first, *others = (Cell(model.name, swatch=tones[model.name]) for model in comparison.models)
    columns = names("Task", first, *(cell for other in others for cell in (other, Cell("change"))))
    groups = [
        Group(KINDS[kind], tuple(table.Row(Cell(t.name, _task_note(t)), tuple(_cells(t, kind))) for t in tasks))
        for kind, tasks in comparison.kinds.items()
    ]
    means = (table.Row(Cell(name), tuple(_cells(row, "choice")), strong=True) for name, row in named_means(comparison))
    groups = [group for group in (*groups, Group("Means", tuple(means))) if group.rows]
    if len(groups) == 1:
        groups = [Group("", groups[0].rows)]
    caption = f"Scores of every model per task, with differences to {comparison.baseline.name}"
    return Table(caption, columns, tuple(groups), "scores compared")


def terminal_table(comparison: Comparison) -> Table:
    """The same with other names of means, intervals in brackets, and a star behind clear differences."""
    first, *others = (Cell(model.name) for model in comparison.models)
    columns = names("", first, *(cell for other in others for cell in (other, Cell("change"))))
    groups = [
        Group(
            KINDS[kind] if len(comparison.kinds) > 1 else "",
            tuple(table.Row(Cell(task.name), tuple(map(_starred, _cells(task, kind)))) for task in tasks),
        )
        for kind, tasks in comparison.kinds.items()
    ]
    means = (
        table.Row(Cell(name), tuple(map(_starred, _cells(row, "choice"))), strong=True)
        for name, row in words.mean_rows(comparison)
    )
    return Table("", columns, (*groups, Group("", tuple(means))))


def mean_table(comparison: Comparison) -> Table:
    """For many models in a terminal: one row each, the mean of all tasks alone."""
    overall, rows = comparison.overall, []
    for place, model in enumerate(comparison.models):
        cells: tuple[Cell, ...] = (Cell(DASH), Cell())
        if overall is not None:
            change = _starred(_change(overall.changes[place - 1], "choice")) if place else Cell()
            cells = (Cell(words.score(overall.scores[place])[0]), Cell(change.text, tone=change.tone, tag=change.tag))
        rows.append(table.Row(Cell(model.name), cells))
    return Table("", names("", "mean", "change"), (Group("", tuple(rows)),))


def named_means(comparison: Comparison) -> list[tuple[str, Row]]:
    """Named as under the heading "Means"."""
    return [(name.removeprefix("mean, ").removeprefix("mean of "), row) for name, row in words.mean_rows(comparison)]


def _task_note(task: TaskRow) -> str:
    """commonsense, acc, 200 items, 5-shot."""
    shots = [f"{task.num_fewshot}-shot"] if task.num_fewshot else []
    capability = [task.capability] if task.capability != OTHER else []
    return ", ".join([*capability, task.metric, f"{task.num_items:,} items", *shots])


def _cells(row: Row, kind: Kind) -> Iterator[Cell]:
    """The baseline's score, then score and change of each other model."""
    for place, figure in enumerate(row.scores):
        value, error = words.score(figure, kind=kind)
        yield Cell(value, f"± {error}" if error else "", inline=True)
        if place:
            yield _change(row.changes[place - 1], kind)


def _change(change: Change, kind: Kind) -> Cell:
    tone = ("up" if change.value > 0 else "down") if change.is_clear else "change"
    return Cell(words.difference(change, kind=kind), words.interval(change, kind=kind), tone=tone)


def _starred(cell: Cell) -> Cell:
    if not cell.tone:
        return cell
    return Cell(cell.text, f"({cell.note})" if cell.note else "", cell.tone, tag=" " if cell.tone == "change" else "*")


def flip_tables(comparison: Comparison) -> list[tuple[str, str, Table]]:
    """For each other model its name, the totals in words, and the tasks whose items are right or wrong."""
    shown = []
    base = comparison.baseline.name
    columns = names(
        "Task", "both", "lost", "won", "neither", "p", Cell("shares that changed, as bars", kind="wide")
    )  # fmt: skip
    for place, model in enumerate(comparison.others):
        changes = [(task.name, task.changes[place]) for task in comparison.tasks]
        flips = [change.flips for _, change in changes if change.flips is not None]
        rows = tuple(_flip_row(name, c.flips, c.is_clear) for name, c in changes if c.flips is not None)
        lost, won = sum(f.num_only_baseline for f in flips), sum(f.num_only_other for f in flips)
        caption = f"Items by which of {base} and {model.name} gets them right"
        if rows:
            totals = f"{lost:,} right to wrong, {won:,} wrong to right"
            shown.append((model.name, totals, Table(caption, columns, (Group("", rows),), "flips")))
    return shown


def _flip_row(task: str, flips: Flips, clear: bool) -> table.Row:
    counts = (flips.num_both, flips.num_only_baseline, flips.num_only_other, flips.num_neither)
    bars = Cell(kind="wide", bars=((counts[1] / sum(counts), "lost"), (counts[2] / sum(counts), "won")))
    p = Cell(p_words(flips.p_value), tone="clear" if clear else "")
    return table.Row(Cell(task), (*names(*(f"{count:,}" for count in counts)), p, bars))


def answer_table(comparison: Comparison, tones: Mapping[str, str]) -> Table:
    """Generation tasks with how each model's answers look; no groups where no answers were kept."""
    groups = []
    for task in comparison.tasks:
        pairs = zip(comparison.models, task.answers, strict=True)
        rows = (
            table.Row(Cell(model.name, swatch=tones[model.name]), names(*_answer_counts(answers)))
            for model, answers in pairs
            if answers is not None
        )
        groups.append(Group(task.name, tuple(rows)))
    columns = names("Model", "right", "wrong", "no answer", "cut off", "tokens")
    return Table("Generated answers of every model per task", columns, tuple(groups), "answers")


def _answer_counts(result: Answers) -> list[str]:
    counts = (result.num_right, result.num_wrong, result.num_no_answer, result.num_truncated)
    tokens = DASH if result.mean_tokens is None else number(result.mean_tokens, 1)
    return [*(DASH if count is None else f"{count:,}" for count in counts), tokens]
