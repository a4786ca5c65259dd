"""Models side by side as one self-contained HTML page, in the look of a run's report."""

from __future__ import annotations

from sdft_ray.report.comparison import tables, words
from sdft_ray.report.comparison.examples import example_groups
from sdft_ray.report.comparison.model import KINDS, Change, Comparison, Row
from sdft_ray.report.toolbox.html import NUM_TONES, environment
from sdft_ray.report.toolbox.lanes import Lane, LaneRow, Lanes, axis_around_zero
from sdft_ray.report.toolbox.numbers import points

MAX_TILES = 6


def render(comparison: Comparison) -> str:
    """The page. Sections without figures are left out; every text is escaped."""
    return environment().get_template("compare.html.j2").render(_context(comparison))


def _context(comparison: Comparison) -> dict[str, object]:
    tones = _tones(comparison)
    return {
        "data": comparison,
        "tones": tones,
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
        "scores": tables.score_table(comparison, tones),
        "flips": tables.flip_tables(comparison),
        "answers": tables.answer_table(comparison, tones),
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


def tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Mean differences, generation and multiple choice apart; none where there would be too many or only one kind."""
    if len(comparison.means) < 2 or len(comparison.means) * len(comparison.others) > MAX_TILES:
        return []
    return [
        (
            f"{model.name}, {_kind_name(row).lower()}",
            points(row.changes[place].value),
            f"points, {words.interval(row.changes[place])}".removesuffix(", "),
        )
        for place, model in enumerate(comparison.others)
        for row in comparison.means
    ]


def _kind_name(row: Row) -> str:
    return next((name for kind, name in KINDS.items() if kind == row.name), row.name)


def changes_chart(comparison: Comparison) -> Lanes | None:
    """Differences of tasks, kind by kind, then of means; None where no score is a share of right answers."""
    parts: list[tuple[str, list[tuple[str, Row]]]] = [
        (KINDS[kind], [(task.name, task) for task in tasks])
        for kind, tasks in comparison.kinds.items()
        if kind != "other"
    ]
    parts.append(("Means", tables.named_means(comparison)))
    changes = [change for _, part in parts for _, row in part for change in row.changes]
    if not changes:
        return None
    axis = axis_around_zero([end for c in changes for end in (c.value, c.low, c.high) if end is not None])

    def lane(model: str, change: Change) -> Lane:
        figure, ends = words.difference(change), words.interval(change)
        text = f"{figure} ({ends}) points" if ends else f"{figure} points"
        return Lane(model, change.value, change.low, change.high, figure, text)

    groups = []
    for name, part in parts:
        rows = [
            LaneRow(title, tuple(map(lane, [m.name for m in comparison.others], row.changes)), strong=name == "Means")
            for title, row in part
        ]
        groups += [(name, tuple(rows))] if rows else []
    labels = tuple(points(tick, 0) for tick in axis.ticks)
    return Lanes(f"Difference to {comparison.baseline.name} per task", tuple(groups), axis, labels, bars=False)
