"""What students kept, in sentences for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sdft_ray.report.run.kept_model import Beside, Bounded, Kept, KeptTask, Lead, Retention, Truncation
from sdft_ray.report.toolbox.numbers import number, plain, points
from sdft_ray.report.toolbox.words import joined

PATCHED = "patched"
"""The one model among the students that was not tuned."""


def difference(found: Bounded, *, is_share: bool = True) -> str:
    """−3.5 in points of a hundred, or as it is for a metric that is no share; a dash where it is unknown."""
    if found.value is None:
        return "–"
    if is_share:
        return points(found.value)
    return f"{'+' if found.value > 0 else ''}{plain(found.value)}"


def interval(found: Bounded, *, is_share: bool = True) -> str:
    """−6.0 to −1.0; "" where it is unknown."""
    if found.low is None or found.high is None:
        return ""
    low, high = (difference(Bounded(value=end), is_share=is_share) for end in (found.low, found.high))
    return f"{low} to {high}"


def reversals(name: str, kept: Kept) -> list[tuple[str, bool]]:
    """Tasks on which a student is worse than the pruned model, and whether beyond chance; those within it apart."""
    found = {task.task: task for task in kept.tasks if task.task in kept.reversals}
    groups = {
        sure: [_gap(found[task]) for task, told in kept.reversals.items() if told is sure]
        for sure in (True, False, None)
    }
    what = "Patching" if name == PATCHED else "Fine-tuning"
    said = {
        True: f"{what} made it worse than pruning alone on",
        False: "Worse as well, but within chance:",
        None: "Worse, and without values per item it cannot be told whether by chance:",
    }
    if not groups[True]:
        said[False] = "Worse than after pruning alone, but within chance:"
    return [(f"{said[sure]} {'; '.join(tasks)}.", bool(sure)) for sure, tasks in groups.items() if tasks]


def _gap(task: KeptTask) -> str:
    """lab_lists: −3.5 points (−6.0 to −1.0)."""
    return f"{task.task}: {_brief(task.from_pruned, is_share=task.is_share)}"


def _brief(found: Beside, *, is_share: bool) -> str:
    ends = interval(found, is_share=is_share)
    return f"{difference(found, is_share=is_share)}{' points' if is_share else ''}{f' ({ends})' if ends else ''}"


def beyond_chance(retention: Retention) -> str:
    """All students' tasks that became worse beyond chance, in one sentence; "" where there is none."""
    told = [
        f"{name} on {_gap(task)}"
        for name, kept in retention.students.items()
        for task in kept.tasks
        if kept.reversals.get(task.task)
    ]
    return f"Worse than after pruning alone, beyond chance: {'; '.join(told)}." if told else ""


def released(retention: Retention) -> str:
    """Which students keep to the bounds of the recipe; "" where it has none."""
    judged = retention.judgements
    good = [name for name, found in judged.items() if found.releasable]
    bad = [name for name in judged if name not in good]
    if not judged:
        return ""
    if not good:
        return f"Not releasable: {joined(bad)} {_miss(bad)} the release bounds of the recipe."
    return f"Releasable: {joined(good)}.{f' Not releasable: {joined(bad)}.' if bad else ''}"


def _miss(names: Sequence[str]) -> str:
    return "misses" if len(names) == 1 else "miss"


def ahead(lead: Lead | None) -> str:
    """Whether the best arm is above the next best beyond chance, with the 95 % interval; "" where nobody knows."""
    if lead is None or lead.difference.value is None or lead.difference.low is None:
        return ""
    gap = f"{number(100 * lead.difference.value, 1)} points ({interval(lead.difference)})"
    if lead.difference.low > 0:
        return f"{lead.best} is ahead of {lead.next_best} by {gap} of the mean score."
    return f"{lead.best} and {lead.next_best} cannot be told apart: their mean scores differ by {gap}."


def truncated(found: Truncation | None) -> list[str]:
    """One warning for each task whose prompts lost their beginning."""
    if found is None:
        return []
    of = f" of {found.context_tokens:,} tokens" if found.context_tokens else ""
    return [
        f"{task}: {num:,} {'requests' if num != 1 else 'request'} lost the beginning of "
        f"{'their' if num != 1 else 'its'} prompt: the context{of} is too short."
        for task, num in found.tasks.items()
    ]


def incomparable(retention: Retention) -> list[str]:
    """Students of which nothing can be said, and why."""
    return [f"What {name} kept cannot be told: {why}." for name, why in retention.incomparable.items()]
