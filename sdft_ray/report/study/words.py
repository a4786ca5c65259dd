"""What a study found, in sentences. Null results and losses are said as plainly as wins."""

from __future__ import annotations

from collections.abc import Sequence

from sdft_ray.report.study.model import ALL, TUNED, Cell, Fit, Panel
from sdft_ray.report.toolbox.numbers import number, percent, points
from sdft_ray.report.toolbox.words import Words
from sdft_ray.statistics.estimate import Estimate


def verdict(panel: Panel) -> list[Words]:
    """Recovery of every arm at the largest size of the first arm, and how far it is from the first arm's."""
    cells = cells_compared(panel)
    first = cells[0]
    words = [Words(f"At {rows(first.num_rows)} {first.arm} recovers "), *_recovery(first, ALL)]
    for position, cell in enumerate(cells[1:]):
        words += [Words(f"{'; ' if position else ', '}{cell.arm} "), *_recovery(cell, ALL), *_against(cell, first.arm)]
    words.append(Words("."))
    missing = [arm for arm in panel.arms if arm not in {cell.arm for cell in cells}]
    if missing:
        words.append(Words(f" Not trained on {rows(first.num_rows)}: {', '.join(missing)}."))
    for group in panel.groups:
        words += _harm(panel, cells, group)
    return words


def cells_compared(panel: Panel) -> list[Cell]:
    """All arms at the largest size that the first arm was trained on, the first arm first."""
    largest = max(cell.num_rows for cell in panel.cells if cell.arm == panel.arms[0])
    students = [panel.cell(arm, largest) for arm in panel.arms]
    return [cell for cell in students if cell is not None]


def _recovery(cell: Cell, group: str) -> list[Words]:
    estimate = cell.recovery[group]
    return [Words(percent(estimate.known), strong=True, model=cell.arm), Words(bounds(estimate))]


def _against(cell: Cell, first: str) -> list[Words]:
    ahead = cell.ahead[ALL]
    assert ahead.value is not None
    if ahead.low is None or ahead.high is None:
        return [Words(f", {points(ahead.value)} points from {first}, which has no interval")]
    if not ahead.is_clear:
        gap = f"{points(ahead.value)} points{bounds(ahead, sign=True)}"
        return [Words(", which "), Words("cannot be told apart", strong=True), Words(f" from {first}: {gap}")]
    size, word = ahead, "more"
    if ahead.value < 0:
        size, word = Estimate(-ahead.value, low=-ahead.high, high=-ahead.low), "less"
    gap = f"{number(100 * size.known, 1)} points {word}"
    return [Words(", "), Words(gap, strong=True), Words(f" than {first}{bounds(size)}")]


def _harm(panel: Panel, cells: Sequence[Cell], group: str) -> list[Words]:
    """Arms whose training took more than it gave: even the upper end of their interval is below no training at all."""
    words = []
    for cell in cells:
        estimate, alone = cell.recovery[group], panel.pruned_of(cell.arm).recovery[group]
        if estimate.high is not None and estimate.high < alone:
            where = {ALL: "Over all tasks", TUNED: "On tuned tasks"}.get(group, "Off-domain")
            words += [Words(f" {where} {cell.arm} is worse than no training: "), *_recovery(cell, group)]
            words.append(Words(f", the pruned model alone {percent(alone)}."))
    return words


def fit_words(fit: Fit) -> str:
    """Why a curve ends where it does, or why there is none; then with the change that was seen."""
    if fit.change is None:
        return fit.note
    change = f"{points(fit.change.known)} points{bounds(fit.change, sign=True)}"
    return f"{fit.note}; from the smallest size to the largest {change}"


def rows(num_rows: float) -> str:
    return "1 row" if num_rows == 1 else f"{num_rows:,.0f} rows"


def bounds(estimate: Estimate, *, sign: bool = False) -> str:
    """(90.4 to 92.0) in per cent, with a space before it; "" without an interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    ends = [points(end) if sign else number(100 * end, 1) for end in (estimate.low, estimate.high)]
    return f" ({ends[0]} to {ends[1]})"
