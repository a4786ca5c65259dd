"""The retention card: what one student kept of its teacher and regained after pruning, task by task.

Tasks whose answers are generated come first: averages of multiple-choice tasks hide that a model can no longer write
(arXiv:2602.01997). The worst task stands beside every mean, for the same reason. Ratios and their standard errors are
those of `recovery`, intervals and tests those of `paired`, at 95 %. Everything is plain data under
`dataclasses.asdict`, and None where it is undefined or cannot be had.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sdft_ray.evaluation.capabilities import capability_of
from sdft_ray.evaluation.recovery import Recovery, recovery
from sdft_ray.statistics.estimate import Estimate, Interval, McNemar, Standard
from sdft_ray.statistics.flips import Flips, flips
from sdft_ray.statistics.multiple import holm
from sdft_ray.statistics.scores import GenerationStats, Scores, TaskScore

_UNDEFINED = Estimate(None, None)
_LEVEL = 0.05
"""Of a test, after Holm's correction."""


@dataclass(frozen=True)
class Comparison:
    """The student's score minus another model's, in units of the metric.

    `interval` is by `paired_bootstrap` and `standard` by the usual methods, for comparison; both are None where the
    score is not the mean of its items. `test` exists only where items are right or wrong; in it the other model is the
    first one. `p_value` is two-sided: the mid-p value of that test, else of the difference over its standard error.
    """

    difference: float | None
    interval: Interval | None
    test: McNemar | None
    standard: Standard | None = None

    @property
    def p_value(self) -> float | None:
        """None where there are no values per item, or a single one."""
        if self.test is not None:
            return self.test.mid_p
        if self.standard is None or self.standard.stderr is None:
            return None
        if self.standard.stderr == 0:
            return 0.0 if self.standard.value else 1.0
        return math.erfc(abs(self.standard.value) / self.standard.stderr / math.sqrt(2))


@dataclass(frozen=True)
class TaskCard:
    """One task. `written` has how the answers look, by model ("teacher", "pruned", "student"), where that is known.

    `not_averaged` says why the task is in no mean; None where it is in them. Both recoveries are undefined for a task
    in no mean, where the teacher is not above 0 (or chance), and, corrected, where chance is unknown.
    """

    task: str
    capability: str
    is_generative: bool
    is_tuned: bool
    metric: str
    higher_is_better: bool
    not_averaged: str | None
    num_items: int
    chance: float | None
    teacher: Estimate
    pruned: Estimate
    student: Estimate
    recovery: Estimate
    chance_corrected: Estimate
    from_teacher: Comparison
    from_pruned: Comparison
    written: dict[str, GenerationStats]
    flips: Flips | None = None
    """From the teacher to the student; None where items are not just right or wrong."""


@dataclass(frozen=True)
class CapabilityCard:
    """Tasks of one capability where higher is better, answered in one way: mean scores, and their ratio."""

    capability: str
    is_generative: bool
    tasks: tuple[str, ...]
    teacher: Estimate
    pruned: Estimate
    student: Estimate
    recovery: Estimate


@dataclass(frozen=True)
class Reversal:
    """A task on which the fine-tuned student is worse than the merely pruned model.

    `p_holm` is the p-value of the difference after Holm's correction for all tasks of the card that have one, so that
    of many tasks on which nothing changed hardly any looks worse. `is_beyond_chance`: it is below 0.05, and the whole
    95 % interval of the difference lies on the wrong side of 0; None where there is no interval.
    """

    task: str
    comparison: Comparison
    is_beyond_chance: bool | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Card:
    """The whole. Overall figures are in the two `Recovery`: `mean`, and beside it `min` with `min_task`.

    Intervals belong to their means, and are None where a task has no values per item. `pruned_recovery` is the mean
    before fine-tuning. `left_out` are tasks that no ratio can be built of: `TaskCard.not_averaged`, or a score is no
    number. `flips` are from teacher to student, over all tasks whose items are right or wrong, `pruned_flips` from
    teacher to pruned model.
    """

    tasks: tuple[TaskCard, ...]
    capabilities: tuple[CapabilityCard, ...]
    recovery: Recovery
    recovery_interval: Interval | None
    chance_corrected: Recovery
    chance_corrected_interval: Interval | None
    pruned_recovery: Estimate
    reversals: tuple[Reversal, ...]
    left_out: tuple[str, ...]
    flips: Flips | None = None
    pruned_flips: Flips | None = None


def retention_card(teacher: Scores, pruned: Scores, student: Scores, *, tuned: Collection[str] = ()) -> Card:
    """Compare a student with its teacher and with the pruned model that it was; `tuned` as in `recovery`.

    Raises `EvaluationError` unless all three have the same tasks with the same metrics, items and lm-eval version.
    """
    from sdft_ray.statistics.paired import (
        check_comparable,  # loads numpy, which a terminal that shows cards does not need
    )

    for first, second in ((teacher, pruned), (teacher, student), (pruned, student)):
        check_comparable(first, second)
    models = _Models(teacher, pruned, student)
    numbers = models.with_numbers()
    whole = recovery(numbers.teacher, numbers.student, tuned=tuned)
    corrected = recovery(numbers.teacher, numbers.student, tuned=tuned, chance_corrected=True)
    before = recovery(numbers.teacher, numbers.pruned)
    tasks = [_task_card(models, name, whole, corrected, is_tuned=name in tuned) for name in teacher.tasks]
    tasks.sort(key=lambda card: not card.is_generative)
    return Card(
        tasks=tuple(tasks),
        capabilities=_capabilities(numbers, [card for card in tasks if card.task in whole.tasks]),
        recovery=whole,
        recovery_interval=_recovery_interval(numbers, list(whole.tasks), chance_corrected=False),
        chance_corrected=corrected,
        chance_corrected_interval=_recovery_interval(numbers, list(corrected.tasks), chance_corrected=True),
        pruned_recovery=before.mean,
        reversals=_reversals(tasks),
        left_out=tuple(name for name in teacher.tasks if name not in whole.tasks),
        flips=_flips(teacher, student, list(teacher.tasks)),
        pruned_flips=_flips(teacher, pruned, list(teacher.tasks)),
    )


def _flips(first: Scores, second: Scores, tasks: Sequence[str]) -> Flips | None:
    return flips((first.tasks[task], second.tasks[task]) for task in tasks)


@dataclass(frozen=True)
class _Models:
    teacher: Scores
    pruned: Scores
    student: Scores

    def of(self, task: str) -> dict[str, TaskScore]:
        """The scores of a task that all have."""
        return {name: scores.tasks[task] for name, scores in self.by_name().items()}

    def by_name(self) -> dict[str, Scores]:
        return {"teacher": self.teacher, "pruned": self.pruned, "student": self.student}

    def with_numbers(self) -> _Models:
        """Without the tasks on which some score is no number, and without errors that are none."""
        parts = [part for scores in self.by_name().values() for part in scores.tasks.values()]
        excluded = {part.task for part in parts if not math.isfinite(part.value)}
        finite = [
            {
                task: replace(part, stderr=_finite(part.stderr))
                for task, part in scores.tasks.items()
                if task not in excluded
            }
            for scores in self.by_name().values()
        ]
        return _Models(*(Scores(tasks) for tasks in finite))

    def only(self, tasks: Sequence[str]) -> _Models:
        return _Models(*(Scores({task: part.tasks[task] for task in tasks}) for part in self.by_name().values()))


def _task_card(models: _Models, task: str, whole: Recovery, corrected: Recovery, *, is_tuned: bool) -> TaskCard:
    scores = models.of(task)
    teacher = scores["teacher"]
    return TaskCard(
        task=task,
        capability=capability_of(task),
        is_generative=any(score.written or score.outputs or score.chance == 0 for score in scores.values()),
        is_tuned=is_tuned,
        metric=teacher.metric,
        higher_is_better=teacher.higher_is_better,
        not_averaged=next((score.not_averaged for score in scores.values() if score.not_averaged), None),
        num_items=teacher.n,
        chance=_finite(teacher.chance),
        teacher=_estimate(teacher),
        pruned=_estimate(scores["pruned"]),
        student=_estimate(scores["student"]),
        recovery=whole.tasks.get(task, _UNDEFINED),
        chance_corrected=corrected.tasks.get(task, _UNDEFINED),
        from_teacher=_comparison(models.teacher, models.student, task),
        from_pruned=_comparison(models.pruned, models.student, task),
        written={name: score.written for name, score in scores.items() if score.written is not None},
        flips=_flips(models.teacher, models.student, [task]),
    )


def _comparison(other: Scores, student: Scores, task: str) -> Comparison:
    from sdft_ray.statistics.paired import has_item_values, mcnemar, paired_bootstrap
    from sdft_ray.statistics.standard import standard_difference

    first, second = other.tasks[task], student.tasks[task]
    is_binary = first.higher_is_better and {*first.items.values(), *second.items.values()} <= {0.0, 1.0}
    has_items = bool(first.items and second.items)
    is_mean = has_item_values(first, second)
    return Comparison(
        difference=_finite(second.value - first.value),
        interval=paired_bootstrap(other, student, tasks=[task]) if is_mean else None,
        test=mcnemar(first, second) if has_items and is_binary else None,
        standard=standard_difference(other, student, tasks=[task]) if is_mean else None,
    )


def _capabilities(numbers: _Models, tasks: Sequence[TaskCard]) -> tuple[CapabilityCard, ...]:
    groups: dict[tuple[str, bool], list[str]] = {}
    for card in tasks:
        groups.setdefault((card.capability, card.is_generative), []).append(card.task)
    cards = []
    for (capability, is_generative), members in groups.items():
        part = numbers.only(members)
        after, before = recovery(part.teacher, part.student), recovery(part.teacher, part.pruned)
        means = after.teacher_mean, before.student_mean, after.student_mean
        cards.append(CapabilityCard(capability, is_generative, tuple(members), *means, after.mean))
    return tuple(cards)


def _recovery_interval(numbers: _Models, tasks: Sequence[str], *, chance_corrected: bool) -> Interval | None:
    from sdft_ray.statistics.paired import has_item_values, recovery_interval

    teacher, student = numbers.teacher, numbers.student
    if not tasks or not has_item_values(*(part.tasks[task] for part in (teacher, student) for task in tasks)):
        return None
    return recovery_interval(teacher, student, tasks=tasks, chance_corrected=chance_corrected)


def _reversals(tasks: Sequence[TaskCard]) -> tuple[Reversal, ...]:
    reversals = []
    adjusted = holm({card.task: p for card in tasks if (p := card.from_pruned.p_value) is not None})
    for card in tasks:
        comparison, sign = card.from_pruned, 1 if card.higher_is_better else -1
        if comparison.difference is None or sign * comparison.difference >= 0:
            continue
        interval = comparison.interval
        edge = None if interval is None else interval.high if card.higher_is_better else interval.low
        p_holm = adjusted.get(card.task)
        beyond = None if edge is None else sign * edge < 0 and (p_holm is None or p_holm < _LEVEL)
        reversals.append(Reversal(card.task, comparison, beyond, p_holm))
    return tuple(reversals)


def _estimate(score: TaskScore) -> Estimate:
    return Estimate(_finite(score.value), _finite(score.stderr))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
