"""What a study found, in sentences. Null results and losses are said as plainly as wins."""

from __future__ import annotations

from collections.abc import Sequence

from sdft_ray.report.study.model import ALL, TUNED, Cell, Fit, Interval, Panel
from sdft_ray.report.toolbox.numbers import number, percent
from sdft_ray.report.toolbox.words import Words


def verdict(panel: Panel) -> list[Words]:
    """Recovery of every arm at the largest size of the first arm, and how far it is from the first arm's."""
    cells = cells_compared(panel)
    first = cells[0]
    said = [Words(f"At {rows(first.num_rows)} {first.arm} recovers "), *_recovery(first, ALL)]
    for position, cell in enumerate(cells[1:]):
        said += [Words(f"{'; ' if position else ', '}{cell.arm} "), *_recovery(cell, ALL), *_against(cell, first.arm)]
    said.append(Words("."))
    missing = [arm for arm in panel.arms if arm not in {cell.arm for cell in cells}]
    if missing:
        said.append(Words(f" Not trained on {rows(first.num_rows)}: {', '.join(missing)}."))
    for group in panel.groups:
        said += _harm(panel, cells, group)
    return said


def cells_compared(panel: Panel) -> list[Cell]:
    """All arms at the largest size that the first arm was trained on, the first arm first."""
    largest = max(cell.num_rows for cell in panel.cells if cell.arm == panel.arms[0])
    found = [panel.cell(arm, largest) for arm in panel.arms]
    return [cell for cell in found if cell is not None]


def plain_text(words: Sequence[Words]) -> str:
    return "".join(part.text for part in words)


def _recovery(cell: Cell, group: str) -> list[Words]:
    found = cell.recovery[group]
    return [Words(percent(found.value), strong=True, model=cell.arm), Words(bounds(found))]


def _against(cell: Cell, first: str) -> list[Words]:
    ahead = cell.ahead[ALL]
    if ahead.low is None or ahead.high is None:
        return [Words(f", {signed(ahead.value)} points from {first}, which has no interval")]
    if not ahead.is_clear:
        gap = f"{signed(ahead.value)} points{bounds(ahead, sign=True)}"
        return [Words(", which "), Words("cannot be told apart", strong=True), Words(f" from {first}: {gap}")]
    size, word = ahead, "more"
    if ahead.value < 0:
        size, word = Interval(-ahead.value, -ahead.high, -ahead.low), "less"
    gap = f"{number(100 * size.value, 1)} points {word}"
    return [Words(", "), Words(gap, strong=True), Words(f" than {first}{bounds(size)}")]


def _harm(panel: Panel, cells: Sequence[Cell], group: str) -> list[Words]:
    """Arms whose training took more than it gave: even the upper end of their interval is below no training at all."""
    said = []
    for cell in cells:
        found, alone = cell.recovery[group], panel.pruned_of(cell.arm).recovery[group]
        if found.high is not None and found.high < alone:
            where = {ALL: "Over all tasks", TUNED: "On tuned tasks"}.get(group, "Off-domain")
            said += [Words(f" {where} {cell.arm} is worse than no training: "), *_recovery(cell, group)]
            said.append(Words(f", the pruned model alone {percent(alone)}."))
    return said


def fit_words(fit: Fit) -> str:
    """Why a curve ends where it does, or why there is none; then with the change that was seen."""
    if fit.change is None:
        return fit.note
    change = f"{signed(fit.change.value)} points{bounds(fit.change, sign=True)}"
    return f"{fit.note}; from the smallest size to the largest {change}"


def rows(num_rows: float) -> str:
    return "1 row" if num_rows == 1 else f"{num_rows:,.0f} rows"


def signed(value: float) -> str:
    """0.031 -> +3.1."""
    text = number(100 * value, 1)
    return text if value <= 0 or text == "0.0" else f"+{text}"


def bounds(found: Interval, *, sign: bool = False) -> str:
    """(90.4 to 92.0) in per cent, with a space before it; "" without an interval."""
    if found.low is None or found.high is None:
        return ""
    ends = [signed(end) if sign else number(100 * end, 1) for end in (found.low, found.high)]
    return f" ({ends[0]} to {ends[1]})"
