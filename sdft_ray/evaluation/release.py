"""Whether a student may be released: bounds on its retention card, and in plain sentences why not.

Bounds on recovery are held against the figure itself, not against the end of its interval: a student just above a bound
passes. A recovery that is undefined never passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.evaluation.card import Card, Reversal, TaskCard

_ROUNDING = 1e-9
"""0.72 / 0.8 keeps a bound of 0.9, though not in floating point."""


@dataclass(frozen=True)
class Bounds:
    """What a student must keep, as shares: of the teacher's mean score over tasks, and of its score on every task.

    None asks for nothing. Under either bound a task on which the teacher scores nothing is a reason: its recovery is
    undefined, and the mean would count whatever the student scores there as kept. `no_task_below_pruned` refuses a
    student whose fine-tuning made a task worse beyond chance: the whole 95 % interval of student less pruned lies below
    zero (above it, where lower is better), and its p-value stays below 0.05 after Holm's correction for the tasks of
    the card; or there is no interval to tell. A task that is lower within noise is among the card's `reversals` and no
    reason here.
    """

    min_recovery: float | None = None
    min_task_recovery: float | None = None
    no_task_below_pruned: bool = False


@dataclass(frozen=True)
class Judgement:
    """`reasons` has one sentence for each bound that fails, one for each task where the bound is on tasks."""

    releasable: bool
    reasons: tuple[str, ...]


def judge(card: Card, bounds: Bounds) -> Judgement:
    """Hold the card against the bounds; without any the student is releasable."""
    reasons = [*_undefined(card, bounds), *_low_mean(card, bounds.min_recovery), *_low_tasks(card, bounds)]
    if bounds.no_task_below_pruned:
        reasons += [_reversed(found) for found in card.reversals if found.is_beyond_chance is not False]
        reasons += [
            f"Whether {task.task} is worse than after pruning alone cannot be told: a score is not a number."
            for task in card.tasks
            if task.from_pruned.difference is None
        ]
    return Judgement(not reasons, tuple(reasons))


def _undefined(card: Card, bounds: Bounds) -> list[str]:
    """Tasks without a recovery: no bound on tasks can hold, and a mean says nothing about a task that has none.

    A mean leaves out the tasks where lower is better or whose scale is not known, which the card says, so it is not
    held against them.
    """
    if bounds.min_recovery is None and bounds.min_task_recovery is None:
        return []
    return [
        f"Recovery on {task.task} is undefined: {_why_undefined(task)}."
        for task in card.tasks
        if task.recovery.value is None and (task.not_averaged is None or bounds.min_task_recovery is not None)
    ]


def _why_undefined(task: TaskCard) -> str:
    if task.not_averaged is not None:
        return task.not_averaged
    if None in (task.teacher.value, task.pruned.value, task.student.value):
        return "a score is not a number"
    return f"the teacher scores {task.teacher.value:g}"


def _low_mean(card: Card, bound: float | None) -> list[str]:
    mean = card.recovery.mean.value
    if bound is None or (mean is not None and mean >= bound - _ROUNDING):
        return []
    if mean is None:
        return ["Mean recovery is undefined: there is no task on which the teacher scores above 0."]
    interval, reach = card.recovery_interval, ""
    if interval is not None and interval.low is not None and interval.high is not None:
        reach = f" ({100 * interval.level:g} % interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %)"
    return [f"Mean recovery is {_below(mean, bound, reach)}."]


def _low_tasks(card: Card, bounds: Bounds) -> list[str]:
    bound = bounds.min_task_recovery
    reasons = []
    for task in card.tasks:
        value, stderr = task.recovery.value, task.recovery.stderr
        if bound is not None and value is not None and value < bound - _ROUNDING:
            reach = "" if stderr is None else f" ± {100 * stderr:.1f}"
            reasons.append(f"Recovery on {task.task} is {_below(value, bound, reach)}.")
    return reasons


def _reversed(reversal: Reversal) -> str:
    comparison = reversal.comparison
    assert comparison.difference is not None, "a reversal has a difference"
    sentence = f"Fine-tuning made {reversal.task} worse than pruning alone: by {abs(comparison.difference):.3f}"
    interval = comparison.interval
    if interval is None:
        return f"{sentence}, and without values per item it cannot be told whether that is chance."
    ends = f"{_signed(interval.low)} to {_signed(interval.high)}"
    corrected = "" if reversal.p_holm is None else f"; p = {reversal.p_holm:.2g} after Holm's correction for all tasks"
    return f"{sentence} ({100 * interval.level:g} % interval of the difference {ends}{corrected})."


def _below(value: float, bound: float, reach: str) -> str:
    """82.1 % (...), below the bound of 85.0 %: with as many decimals as tell them apart."""
    digits = 1
    while f"{100 * value:.{digits}f}" == f"{100 * bound:.{digits}f}" and digits < 9:
        digits += 1
    return f"{100 * value:.{digits}f} %{reach}, below the bound of {100 * bound:.{digits}f} %"


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f}".replace("-", "\u2212")
