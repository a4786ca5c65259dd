"""Models side by side in a terminal: scores, differences, and a few lines for each pair.

Loads neither torch nor jinja.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from sdft_ray.report.comparison.model import KINDS, Change, Comparison, Kind, Row
from sdft_ray.report.comparison.words import (
    clear_note,
    details,
    difference,
    interval,
    level,
    mean_rows,
    missing_answers,
    score,
)
from sdft_ray.report.toolbox.numbers import THIN


def shown(comparison: Comparison) -> Group:
    """Everything, top to bottom."""
    lines = []
    for place, model in enumerate(comparison.others):
        lines.append(Text.assemble((model.name, "bold"), ": ", _plain(details(comparison, place))))
    return Group(ComparisonTable(comparison), Text(""), *lines, *_answers(comparison), *_notes(comparison))


@dataclass(frozen=True)
class _Shape:
    """What a table has room for."""

    errors: bool
    intervals: bool


class ComparisonTable:
    """A table that leaves out standard errors, then intervals, where the terminal is too narrow, then tasks."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbound = options.update(max_width=10_000)
        brackets = f"in brackets {_plain(level(self._comparison))} intervals, paired by item."
        shapes = [
            (_table(self._comparison, _Shape(True, True)), f"± is one standard error; changes in points, {brackets}"),
            (_table(self._comparison, _Shape(False, True)), f"Changes in points, {brackets}"),
            (_table(self._comparison, _Shape(False, False)), "Changes in points."),
            (_by_model(self._comparison), "Changes in points. The page has the tasks."),
        ]
        fitting = (s for s in shapes if Measurement.get(console, unbound, s[0]).maximum <= options.max_width)
        table, note = next(fitting, shapes[-1])
        yield table
        yield Text(f"Per cent. {note}", style="dim")


def _frame(*columns: Column) -> Table:
    first = Column("", max_width=22, overflow="ellipsis", no_wrap=True)
    return Table(first, *columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))


def _right(name: str) -> Column:
    return Column(Text(name), justify="right", no_wrap=True)


def _table(comparison: Comparison, shape: _Shape) -> Table:
    columns = [_right(comparison.baseline.name)]
    for model in comparison.others:
        columns += [_right(model.name), _right("change")]
    table = _frame(*columns)
    for kind, tasks in comparison.kinds.items():
        if len(comparison.kinds) > 1:
            table.add_row(Text(KINDS[kind], style="dim"))
        for task in tasks:
            table.add_row(Text(task.name), *_cells(task, shape, kind))
    for place, (name, row) in enumerate(mean_rows(comparison)):
        if not place:
            table.add_row()
        table.add_row(Text(name), *_cells(row, shape, "choice"), style="bold")
    return table


def _cells(row: Row, shape: _Shape, kind: Kind) -> list[Text]:
    """The baseline's score, then score and change of each other model."""
    cells = []
    for place, figure in enumerate(row.scores):
        value, error = score(figure, kind=kind)
        cell = Text(value)
        if shape.errors and error:
            cell.append(f" ± {error}", "dim")
        cells.append(cell)
        if place:
            cells.append(_change(row.changes[place - 1], shape, kind))
    return cells


def _change(change: Change, shape: _Shape, kind: Kind) -> Text:
    colour = ("green" if change.value > 0 else "red") if change.is_clear else ""
    cell = Text(difference(change, kind=kind), style=colour)
    ends = interval(change, kind=kind)
    if shape.intervals and ends:
        cell.append(f" ({ends})", "dim")
    return cell.append("*" if change.is_clear else " ")


def _by_model(comparison: Comparison) -> Table:
    """For many models: one row each, the means alone."""
    table = _frame(_right("mean"), _right("change"))
    row = comparison.overall
    for place, model in enumerate(comparison.models):
        if row is None:
            table.add_row(Text(model.name), "–", "")
            continue
        change = _change(row.changes[place - 1], _Shape(False, False), "choice") if place else Text("")
        table.add_row(Text(model.name), score(row.scores[place])[0], change)
    return table


def _answers(comparison: Comparison) -> list[Text]:
    """Of generated answers, how many gave nothing to compare, and how many were cut off; nothing where none was."""
    lines = []
    for place, model in enumerate(comparison.models):
        known = [answers for task in comparison.tasks if (answers := task.answers[place]) is not None]
        num = sum(part.num_right + part.num_wrong + part.num_no_answer for part in known)
        told = [(sum(part.num_no_answer for part in known), "without an answer that the task’s filter finds")]
        told += [(sum(part.num_truncated or 0 for part in known), "cut off at the limit of new tokens")]
        said = [f"{count:,} {what}" for count, what in told if count]
        if said:
            lines.append(Text(f"{model.name}: of {num:,} generated answers {', '.join(said)}."))
    return lines


def _notes(comparison: Comparison) -> list[Text]:
    notes = []
    if any(change.is_clear for task in comparison.tasks for change in task.changes):
        notes.append(f"* {clear_note()} Of a mean: its interval does not hold 0.")
    if missing := missing_answers(comparison):
        notes.append(missing)
    return [Text(note, style="dim") for note in notes]


def _plain(text: str) -> str:
    return text.replace(THIN, " ")
