"""A study in a terminal: per panel the verdict, recovery by size, and what more rows would bring.

Loads neither numpy nor jinja.
"""

from __future__ import annotations

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from sdft_ray.report.study.model import ALL, Panel, StudyData
from sdft_ray.report.study.tables import recovery_table
from sdft_ray.report.study.words import bounds, fit_words, rows, verdict
from sdft_ray.report.toolbox.numbers import THIN, number, points
from sdft_ray.report.toolbox.table import Fitting, for_terminal


def study_lines(study: StudyData) -> Group:
    """All panels, top to bottom."""
    parts = [part for panel in study.panels for part in (*_panel(panel), Text(""))]
    return Group(*parts, Text("Recovery in per cent of the teacher; in brackets 95 % intervals.", style="dim"))


def _panel(panel: Panel) -> list[Text | Padding | Fitting]:
    """A narrow terminal loses intervals, then the smaller sizes."""
    words = Text()
    for part in verdict(panel):
        words.append(part.text.replace(THIN, " "), style="bold" if part.strong else "")
    sizes = panel.sizes
    shapes = ((sizes, sizes), (sizes, sizes[-1:]), (sizes, ()), (sizes[-1:], ()))
    table = Fitting((for_terminal(recovery_table(panel, shown, bounded)), "") for shown, bounded in shapes)
    more = [Padding(Text(line), (0, 0, 0, 2)) for line in more_lines(panel)]
    return [Text(panel.name, style="bold"), words, Text(""), table, Text(""), *more]


def more_lines(panel: Panel) -> list[str]:
    """Of every arm, over all tasks: what twice the rows would add, and the asymptote, or why there is no curve."""
    lines = []
    for arm in panel.arms:
        fit = panel.fits[arm, ALL]
        parts = [fit_words(fit)] if fit_words(fit) else []
        if fit.more and fit.more[0].gain is not None:
            more, gain = rows(fit.more[0].num_rows), fit.more[0].gain
            parts.insert(0, f"{more} would add {points(gain.known)} points{bounds(gain, sign=True)}")
        if fit.asymptote is not None:
            ceiling = number(100 * fit.asymptote.known, 1)
            parts.insert(1, f"endless rows reach {ceiling}{bounds(fit.asymptote)}")
        lines.append(f"{arm}: {'; '.join(parts)}")
    return lines
