"""Why these blocks? In a terminal: the distances of all runs as a heat map, and what was nearly chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sdft_ray.report.run.heat import MAX_NUMBERED, HeatCell, heat_cells
from sdft_ray.report.run.model import Distances, Plan
from sdft_ray.report.run.words import removed_words
from sdft_ray.report.toolbox.numbers import MINUS

Scored = Mapping[str, Mapping[str, float]]
"""Task -> `value` in [0, 1], `stderr`, `n`."""


@dataclass(frozen=True)
class Candidate:
    """A removal, its score by the metric, and the model's scores without these blocks where they were evaluated."""

    blocks: tuple[int, ...]
    score: float | None
    """None where the metric does not compare it."""
    scores: Scored | None = None
    chosen: bool = False
    metrics: tuple[str, ...] = ()
    """For `metric: best`: the metrics that would remove it."""


@dataclass(frozen=True)
class Why:
    """All that `sdft why` shows. `unit` says what a candidate's score is; `whole` is what nothing removed scores."""

    plan: Plan
    distances: Distances
    unit: str
    candidates: tuple[Candidate, ...]
    num_candidates: int
    """Of how many these are the first."""
    whole: Scored | None = None
    channels: tuple[Channel, ...] = ()


@dataclass(frozen=True)
class Channel:
    """A space that shrank: how many members stay, what share of all activity goes, and how close the call was.

    `margin` is the least active member that stays over the most active that goes, the closest over all blocks.
    """

    space: str
    kept: int
    size: int
    activity_removed: float
    margin: float


def shown(why: Why) -> Group:
    """Everything, top to bottom."""
    parts = [Text(removed_words(why.plan)), Text("")]
    if why.plan.removed_blocks:
        parts += [_map(why), Text(""), *_table(why)]
    if why.channels:
        parts += [Text(""), *_channels(why.channels)]
    return Group(*parts)


def _map(why: Why) -> Group:
    """A row for each n, longest on top, as many columns as blocks; the chosen run is underlined."""
    is_mean = why.plan.position != "last"
    matrix = why.distances.angular_mean_LN if is_mean else why.distances.angular_last_LN
    num_blocks = why.plan.num_blocks
    width = 3 if num_blocks <= MAX_NUMBERED else 2
    by_row: dict[int, list[HeatCell]] = {}
    for cell in heat_cells(matrix, why.plan):
        by_row.setdefault(cell.n, []).append(cell)
    tokens = "mean over tokens" if is_mean else "last token"
    lines = [Text(f"Angular distance between the inputs of blocks l and l + n, {tokens}")]
    for n in sorted(by_row, reverse=True):
        line = Text(f"{'n = ' if n == len(by_row) else ''}{n} ".rjust(8))
        for cell in by_row[n]:
            ink, taken = "black" if cell.ink == "#000" else "white", cell.chosen
            text = (cell.label if width == 3 else ("▁" if taken else "")).rjust(width)
            line.append(text, Style(color=ink, bgcolor=cell.color, bold=taken, underline=taken))
        if any(cell.chosen for cell in by_row[n]):
            line.append(" ← chosen, underlined", "dim")
        lines.append(line)
    numbers = "".join(str(block).rjust(width) if width == 3 or block % 5 == 0 else "  " for block in range(num_blocks))
    lines.append(Text("    l = ".rjust(8) + numbers))
    return Group(*lines)


def _table(why: Why) -> tuple[Text, Table]:
    """The chosen removal among those that would have been next; damage in points below the whole model."""
    tasks = tuple(why.whole or ())
    note = f"; then points won or lost on each task, {_items(why.whole)} items" if why.whole else ""
    every = [scores for scores in (why.whole, *(candidate.scores for candidate in why.candidates)) if scores]
    left_out = {
        task: scores[task]["not_averaged"] for scores in every for task in tasks if "not_averaged" in scores[task]
    }
    averaged = [task for task in tasks if task not in left_out]
    if left_out:
        note += f"; not in the mean: {', '.join(f'{task} ({reason})' for task, reason in left_out.items())}"
    title = (
        f"The first {len(why.candidates)} of {why.num_candidates} removals that the metric compares: {why.unit}{note}"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("removed")
    table.add_column("score", justify="right")
    for task in tasks:
        table.add_column(task, justify="right")
    if tasks:
        table.add_column("mean", justify="right")
    says_who = any(candidate.metrics for candidate in why.candidates)
    if says_who:
        table.add_column("removed by")
    if why.whole:
        whole = why.whole
        cells = [f"{(1 if task in left_out else 100) * whole[task]['value']:.1f}" for task in tasks]
        mean = f"{100 * _mean(whole, averaged):.1f}" if averaged else "–"
        table.add_row("nothing", "", *cells, mean, style="dim")
    for candidate in why.candidates:
        lost: list[str] = []
        if candidate.scores is not None and why.whole is not None:
            points = {task: candidate.scores[task]["value"] - why.whole[task]["value"] for task in tasks}
            lost = [_points(points[task] / 100 if task in left_out else points[task]) for task in tasks]
            lost.append(_points(sum(points[task] for task in averaged) / len(averaged)) if averaged else "–")
        name = _listed(candidate.blocks) + (" ← chosen" if candidate.chosen else "")
        score = "–" if candidate.score is None else f"{candidate.score:.4f}"
        who = ["; ".join(candidate.metrics)] if says_who else []
        lost += [""] * (len(table.columns) - 2 - len(lost) - len(who))
        table.add_row(name, score, *lost, *who, style="bold" if candidate.chosen else "")
    return Text(title), table


def _channels(channels: Sequence[Channel]) -> tuple[Text, Table]:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("space")
    for name in ("kept", "activity that goes", "closest call"):
        table.add_column(name, justify="right")
    for channel in channels:
        share, margin = f"{100 * channel.activity_removed:.1f} %", f"{100 * (channel.margin - 1):.2f} %"
        table.add_row(channel.space, f"{channel.kept:,} of {channel.size:,}", share, margin)
    note = "Channels; closest call: how much more active the least active that stays is than the first that goes"
    return Text(note), table


def _points(change: float) -> str:
    points = 100 * change
    return "0.0" if abs(points) < 0.05 else f"{MINUS if points < 0 else '+'}{abs(points):.1f}"


def _mean(scores: Scored, tasks: Sequence[str]) -> float:
    return sum(scores[task]["value"] for task in tasks) / len(tasks)


def _items(whole: Scored) -> str:
    counts = sorted({int(score["n"]) for score in whole.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _listed(blocks: Sequence[int]) -> str:
    """4-7, or 2, 5, 6."""
    if len(blocks) > 1 and blocks[-1] - blocks[0] == len(blocks) - 1:
        return f"{blocks[0]}-{blocks[-1]}"
    return ", ".join(map(str, blocks))
