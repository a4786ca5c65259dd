"""What the page and the terminal both say of models side by side, in words."""

from __future__ import annotations

from sdft_ray.evaluation.capabilities import OTHER
from sdft_ray.report.comparison.model import KINDS, SURE, Change, Comparison, Estimate, Kind, Row, TaskRow
from sdft_ray.report.toolbox.numbers import THIN, number, plain, points
from sdft_ray.report.toolbox.words import Words, joined

MAX_NAMED = 4
"""Models in the headline."""
NOTE = (
    "± is one standard error. Intervals are of the difference, paired by item, from a bootstrap; the spread between "
    "training seeds is not in them."
)


def interval(change: Change, *, kind: Kind = "choice") -> str:
    """−15.1 to −9.7, in points; as it is for a metric of another kind; "" where it is unknown."""
    if change.low is None or change.high is None:
        return ""
    ends = (change.low, change.high)
    low, high = (plain(end) for end in ends) if kind == "other" else (points(end) for end in ends)
    return f"{low} to {high}"


def difference(change: Change, *, kind: Kind = "choice") -> str:
    """The difference alone, signed."""
    if kind != "other":
        return points(change.value)
    return f"{'+' if change.value > 0 else ''}{plain(change.value)}"


def score(figure: Estimate, *, kind: Kind = "choice") -> tuple[str, str]:
    """The score and its standard error; the error is "" where it is unknown."""
    if figure.value is None:
        return "–", ""
    shown = plain if kind == "other" else (lambda value: number(100 * value, 1))
    return shown(figure.value), "" if figure.stderr is None else shown(figure.stderr)


def verdict(comparison: Comparison) -> list[Words]:
    """One sentence: how far each other model's mean is from the baseline's, or that it cannot be told."""
    row, base = comparison.overall, comparison.baseline.name
    if row is None:
        return [Words(f"{base} and {joined([m.name for m in comparison.others])}: no metric that has a mean.")]
    over = row.tasks[0] if len(row.tasks) == 1 else f"the mean of {len(row.tasks)} tasks"
    pieces = [Words(f"On {over}, ")]
    pairs = list(zip(comparison.others, row.changes, strict=True))
    for place, (model, change) in enumerate(pairs[:MAX_NAMED]):
        if change.low is not None and not change.is_clear:
            verb, strong, rest = "", "cannot be told apart", f" from {'it' if place else base}"
        else:
            gap = f"{number(100 * abs(change.value), 1)}{THIN}points"
            verb, strong = "is ", f"{gap} {'above' if change.value > 0 else 'below'}"
            rest = "" if place else f" {base}"
        pieces += [Words(f"{'; ' if place else ''}{model.name} {verb}"), Words(strong, True, model.name), Words(rest)]
    more = len(pairs) - MAX_NAMED
    return [*pieces, Words(f"; {more} more below." if more > 0 else ".")]


def details(comparison: Comparison, place: int) -> str:
    """Of the other model at `place`: its interval, items that flipped, and tasks that clearly differ, in sentences."""
    base, pieces = comparison.baseline.name, []
    if comparison.overall is not None:
        change = comparison.overall.changes[place]
        ends = interval(change)
        pieces.append(f"{points(change.value)} points" + (f", {level(comparison)} interval {ends}" if ends else ""))
    flips = [task.changes[place].flips for task in comparison.tasks]
    known = [flip for flip in flips if flip is not None]
    if known:
        lost, won = sum(flip.num_only_baseline for flip in known), sum(flip.num_only_other for flip in known)
        pieces.append(f"{lost:,} items that {base} gets right went wrong, {won:,} the other way")
    by_direction = {
        "worse": [task.name for task in comparison.tasks if _clear(task, place) < 0],
        "better": [task.name for task in comparison.tasks if _clear(task, place) > 0],
    }
    named = [f"{how} on {joined(names)}" for how, names in by_direction.items() if names]
    if known:
        pieces.append(f"clearly {' and '.join(named)}" if named else "clearly different on no single task")
    return f"{'; '.join(pieces)}." if pieces else ""


def _clear(task: TaskRow, place: int) -> float:
    change = task.changes[place]
    return change.value if change.is_clear and change.flips is not None else 0.0


def clear_note() -> str:
    """What "clearly" means."""
    return f"“Clearly”: exact McNemar test, p < {SURE:g} after Holm’s correction over the tasks."


def missing_answers(comparison: Comparison) -> str:
    """Why there are no examples of some pairs, and what to do; "" where all is there."""
    names = comparison.without_answers
    if not names:
        return ""
    was = "was" if len(names) == 1 else "were"
    return (
        f"Example answers need a new evaluation: {joined(names)} {was} evaluated before answers were kept. "
        "Run the recipe again with sdft compress."
    )


def level(comparison: Comparison) -> str:
    """95 %."""
    return f"{number(100 * comparison.level, 0)}{THIN}%"


def mean_rows(comparison: Comparison) -> list[tuple[str, Row]]:
    """Means under their names: by kind, by capability, over all; none that says what another says."""
    shown: list[tuple[str, Row]] = []
    if len(comparison.means) > 1:
        shown += [(f"mean, {KINDS[row.name].lower()}", row) for row in comparison.means if row.name in KINDS]
    seen = {row.tasks for row in comparison.means}
    if len(comparison.capabilities) > 1:
        shown += [(f"mean, {row.name}", row) for row in comparison.capabilities if _adds(row, seen)]
    if comparison.overall is not None and len(comparison.overall.tasks) > 1:
        shown.append(("mean of all", comparison.overall))
    return shown


def _adds(row: Row, seen: set[tuple[str, ...]]) -> bool:
    """A capability of one task says what the task says; tasks that have none in common are no capability."""
    return len(row.tasks) > 1 and row.tasks not in seen and row.name != OTHER
