"""Models side by side in a terminal: scores, differences, and a few lines for each pair.

Loads neither torch nor jinja.
"""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from sdft_ray.report.comparison.model import Comparison
from sdft_ray.report.comparison.tables import mean_table, terminal_table
from sdft_ray.report.comparison.words import clear_note, details, level, missing_answers
from sdft_ray.report.toolbox.numbers import THIN
from sdft_ray.report.toolbox.table import Fitting, for_terminal, without_notes


def shown(comparison: Comparison) -> Group:
    """Everything, top to bottom. A narrow terminal loses standard errors, then intervals, then tasks."""
    lines = []
    for place, model in enumerate(comparison.others):
        lines.append(Text.assemble((model.name, "bold"), ": ", _plain(details(comparison, place))))
    return Group(_table(comparison), Text(""), *lines, *_answers(comparison), *_notes(comparison))


def _table(comparison: Comparison) -> Fitting:
    whole = terminal_table(comparison)
    scores = [0, *range(1, 2 * len(comparison.others), 2)]
    brackets = f"in brackets {_plain(level(comparison))} intervals, paired by item."
    shapes = (
        (whole, f"± is one standard error; changes in points, {brackets}"),
        (without_notes(whole, scores), f"Changes in points, {brackets}"),
        (without_notes(whole), "Changes in points."),
        (mean_table(comparison), "Changes in points. The page has the tasks."),
    )
    return Fitting((for_terminal(table), f"Per cent. {note}") for table, note in shapes)


def _answers(comparison: Comparison) -> list[Text]:
    """Of generated answers, how many gave nothing to compare, and how many were cut off; nothing where none was."""
    lines = []
    for place, model in enumerate(comparison.models):
        known = [answers for task in comparison.tasks if (answers := task.answers[place]) is not None]
        num = sum(part.num_right + part.num_wrong + part.num_no_answer for part in known)
        counts = [(sum(part.num_no_answer for part in known), "without an answer that the task’s filter finds")]
        counts += [(sum(part.num_truncated or 0 for part in known), "cut off at the limit of new tokens")]
        parts = [f"{count:,} {what}" for count, what in counts if count]
        if parts:
            lines.append(Text(f"{model.name}: of {num:,} generated answers {', '.join(parts)}."))
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
