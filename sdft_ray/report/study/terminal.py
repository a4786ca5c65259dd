"""A study in a terminal: per panel the verdict, recovery by size, and what more rows would bring.

Loads neither numpy nor jinja.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sdft_ray.report.study.model import ALL, Interval, Panel, StudyData
from sdft_ray.report.study.words import bounds, cells_compared, fit_words, rows, signed, verdict
from sdft_ray.report.toolbox.numbers import THIN, number


def study_lines(study: StudyData) -> Group:
    """All panels, top to bottom."""
    parts = [part for panel in study.panels for part in (*_panel(panel), Text(""))]
    return Group(*parts, Text("Recovery in per cent of the teacher; in brackets 95 % intervals.", style="dim"))


def _panel(panel: Panel) -> list[Text | Padding | RecoveryTable]:
    said = Text()
    for part in verdict(panel):
        said.append(part.text.replace(THIN, " "), style="bold" if part.strong else "")
    more = [Padding(Text(line), (0, 0, 0, 2)) for line in more_lines(panel)]
    return [Text(panel.name, style="bold"), said, Text(""), RecoveryTable(panel), Text(""), *more]


def more_lines(panel: Panel) -> list[str]:
    """Of every arm, over all tasks: what twice the rows would add, and the asymptote, or why there is no curve."""
    lines = []
    for arm in panel.arms:
        fit = panel.fits[arm, ALL]
        said = [fit_words(fit)] if fit_words(fit) else []
        if fit.more and fit.more[0].gain is not None:
            more, gain = rows(fit.more[0].num_rows), fit.more[0].gain
            said.insert(0, f"{more} would add {signed(gain.value)} points{bounds(gain, sign=True)}")
        if fit.asymptote is not None:
            said.insert(1, f"endless rows reach {number(100 * fit.asymptote.value, 1)}{bounds(fit.asymptote)}")
        lines.append(f"{arm}: {'; '.join(said)}")
    return lines


class RecoveryTable:
    """Arms by training rows, over all tasks; narrow terminals lose intervals, then the smaller sizes."""

    def __init__(self, panel: Panel) -> None:
        self._panel = panel

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbound = options.update(max_width=10_000)
        sizes = self._panel.sizes
        shapes = [
            _table(self._panel, sizes, sizes),
            _table(self._panel, sizes, sizes[-1:]),
            _table(self._panel, sizes, ()),
            _table(self._panel, sizes[-1:], ()),
        ]
        fitting = (shape for shape in shapes if Measurement.get(console, unbound, shape).maximum <= options.max_width)
        yield next(fitting, shapes[-1])


def _table(panel: Panel, sizes: Sequence[int], with_bounds: Sequence[int]) -> Table:
    table = Table(
        Column("", max_width=22, overflow="ellipsis", no_wrap=True),
        Column("pruned", justify="right", no_wrap=True, style="dim"),
        *(Column(rows(size) if size == sizes[-1] else f"{size:,}", justify="right", no_wrap=True) for size in sizes),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    compared = cells_compared(panel)
    best = max(compared, key=lambda cell: cell.recovery[ALL].value).arm
    for arm in panel.arms:
        cells = [panel.cell(arm, size) for size in sizes]
        found = [cell.recovery[ALL] if cell is not None else None for cell in cells]
        shown = [_cell(one, bounded=size in with_bounds) for one, size in zip(found, sizes, strict=True)]
        alone = number(100 * panel.pruned_of(arm).recovery[ALL], 1)
        table.add_row(Text(arm, style="bold green" if arm == best else ""), alone, *shown)
    return table


def _cell(found: Interval | None, *, bounded: bool) -> Text:
    if found is None:
        return Text("–", style="dim")
    text = Text(number(100 * found.value, 1))
    if bounded:
        text.append(bounds(found), style="dim")
    return text
