"""One table, three renderers: HTML by the macro `table` of macros.html.j2, a terminal by rich, and Markdown.

Light to import: a terminal's view loads neither jinja nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from sdft_ray.report.toolbox.markdown import Raw, escaped
from sdft_ray.report.toolbox.numbers import THIN, number, percent, plain
from sdft_ray.statistics.estimate import Estimate

DASH = "–"
_STYLES = {"up": "green", "down": "red", "best": "bold green", "clear": "bold", "soft": "dim"}


@dataclass(frozen=True)
class Cell:
    """A value with a `note` (its error, its interval, what it is compared with), or `bars` of (share, tone).

    `inline`: the page shows the note beside the value, else below it. `tone` is a class of the page and a style of the
    terminal; `kind` is the class of the HTML cell, `swatch` the tone of a colour sample, `span` a number of columns.
    """

    text: str = ""
    note: str = ""
    tone: str = ""
    inline: bool = False
    tag: str = ""
    tag_tone: str = ""
    swatch: str = ""
    kind: str = "num"
    bars: tuple[tuple[float, str], ...] = ()
    span: int = 1


@dataclass(frozen=True)
class Row:
    """`strong` rows are means and the like."""

    head: Cell
    cells: tuple[Cell, ...]
    strong: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under a name, or apart from others where it is ""."""

    name: str
    rows: tuple[Row, ...]
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """`columns` starts with that of the row heads; `spanning` is a line above them. Groups without rows are dropped."""

    caption: str
    columns: tuple[Cell, ...]
    groups: tuple[Group, ...]
    classes: str = ""
    spanning: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(group for group in self.groups if group.rows))


def names(*titles: str | Cell) -> tuple[Cell, ...]:
    """Columns."""
    return tuple(Cell(title) if isinstance(title, str) else title for title in titles)


def bar(share: float, tone: str = "neutral") -> Cell:
    """A bar from zero; `share` is in [0, 1]."""
    return Cell(kind="wide", bars=((share, tone),))


def share(value: float, digits: int = 1) -> str:
    """0.915 -> 91.5."""
    return number(100 * value, digits)


def estimate(value: Estimate | None, *, is_share: bool = True, inline: bool = False) -> Cell:
    """A value and its standard error, in per cent if it is a share; a dash where it is unknown."""
    if value is None or value.value is None:
        return Cell(DASH)
    shown, gap = share if is_share else plain, " " if inline else THIN
    return Cell(shown(value.value), "" if value.stderr is None else f"±{gap}{shown(value.stderr)}", inline=inline)


def fact(value: Estimate) -> str:
    """92.3 %, or a dash."""
    return DASH if value.value is None else percent(value.value)


# --- terminal -----------------------------------------------------------------------------------------------


class Fitting:
    """The first of several views that is not wider than the terminal, else the last, with its note."""

    def __init__(self, views: Iterable[tuple[RenderableType, str]]) -> None:
        self._views = list(views)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._views:
            return
        unbound = options.update(max_width=10_000)
        widths = (Measurement.get(console, unbound, view).maximum for view, _ in self._views)
        fitting = [place for place, width in enumerate(widths) if width <= options.max_width]
        view, note = self._views[fitting[0] if fitting else -1]
        yield view
        if note:
            yield Text(note, style="dim")


def without_notes(table: Table, columns: Sequence[int] | None = None) -> Table:
    """The table without the notes of all cells, or of those in `columns` (0 is the first after the heads)."""

    def bare(row: Row) -> Row:
        cells = (replace(c, note="") if columns is None or i in columns else c for i, c in enumerate(row.cells))
        return replace(row, cells=tuple(cells))

    return replace(table, groups=tuple(replace(g, rows=tuple(map(bare, g.rows))) for g in table.groups))


def for_terminal(table: Table) -> RichTable:
    """In rich's terms; group names are lines of their own where there are several groups."""
    head = Column(Text(table.columns[0].text), max_width=22, overflow="ellipsis", no_wrap=True)
    columns = (Column(_text(cell), justify="right", no_wrap=True) for cell in table.columns[1:])
    terminal = RichTable(
        head, *columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1)
    )  # fmt: skip
    for place, group in enumerate(table.groups):
        if group.name and len(table.groups) > 1:
            terminal.add_row(Text(group.name, style="dim"))
        elif place:
            terminal.add_row()
        for row in group.rows:
            cells = map(_text, (replace(row.head, note=""), *row.cells))
            terminal.add_row(*cells, style="bold" if row.strong else "")
    return terminal


def _text(cell: Cell) -> Text:
    text = Text(cell.text.replace(THIN, " "), style="dim" if cell.text == DASH else _STYLES.get(cell.tone, ""))
    if cell.note:
        text.append(f" {cell.note.replace(THIN, ' ')}", style="not bold dim")
    return text.append(cell.tag)


# --- Markdown -----------------------------------------------------------------------------------------------


def for_markdown(table: Table) -> str:
    """As GitHub reads it; a group's name is a line of its own, a "best" cell is bold."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [[escaped(cell.text) for cell in table.columns], rule]
    for group in table.groups:
        lines += [[f"**{escaped(group.name)}**"]] if group.name else []
        lines += [[_markdown(cell) for cell in (row.head, *row.cells)] for row in group.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(cell: Cell) -> str:
    value = cell.text if isinstance(cell.text, Raw) else escaped(cell.text)
    bold = f"**{value}**" if cell.tone == "best" else value
    return f"{bold} {escaped(cell.note)}" if cell.note else bold
