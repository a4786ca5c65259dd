"""From the scores of several models on the same items to the figures that set them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sdft_ray.evaluation.capabilities import capability_of
from sdft_ray.report.comparison.answers import Key, Mark, count_answers
from sdft_ray.report.comparison.model import SURE, Answers, Change, Flips, Kind, Row, TaskRow
from sdft_ray.statistics.estimate import Estimate
from sdft_ray.statistics.paired import has_item_values, mcnemar, paired_bootstrap
from sdft_ray.statistics.scores import Scores, TaskScore


@dataclass(frozen=True)
class Figures:
    """Models in order, the baseline first, on tasks that all were evaluated on in the same way.

    `marks` has, for each model, what is known of its answers; empty where they were not kept.
    """

    scores: Sequence[Scores]
    marks: Sequence[Mapping[Key, Mark]]
    level: float

    def tasks(self) -> tuple[TaskRow, ...]:
        """A row for each task, in the baseline's order. Raises `EvaluationError` as `mcnemar`."""
        return with_clear_ones([self._task(name) for name in self.scores[0].tasks])

    def means(self, tasks: Sequence[TaskRow], part_of: Callable[[TaskRow], str]) -> tuple[Row, ...]:
        """A row for each part that the tasks fall into, in their order; tasks of other metrics are left out."""
        parts: dict[str, list[str]] = {}
        for task in tasks:
            if task.kind != "other":
                parts.setdefault(part_of(task), []).append(task.name)
        return tuple(self._mean(name, members) for name, members in parts.items())

    def _task(self, name: str) -> TaskRow:
        result = [scores.tasks[name] for scores in self.scores]
        first, mean, kind = result[0], self._mean(name, [name]), _kind(result)
        changes = zip(mean.changes, result[1:], strict=True)
        return TaskRow(
            name=name,
            tasks=(name,),
            scores=mean.scores,
            changes=tuple(replace(change, flips=flips(first, other)) for change, other in changes),
            kind=kind,
            capability=capability_of(name),
            metric=first.metric,
            num_items=first.n,
            num_fewshot=first.num_fewshot,
            chance=first.chance,
            answers=self._answers(result) if kind == "generation" else (None,) * len(result),
        )

    def _answers(self, result: Sequence[TaskScore]) -> tuple[Answers | None, ...]:
        pairs = zip(result, self.marks, strict=True)
        return tuple(count_answers(score, marks) if is_right_or_wrong(score) else None for score, marks in pairs)

    def _mean(self, name: str, tasks: Sequence[str]) -> Row:
        scores = tuple(_mean([own.tasks[task] for task in tasks]) for own in self.scores)
        changes = tuple(self._change(other, tasks) for other in self.scores[1:])
        return Row(name, tuple(tasks), scores, changes)

    def _change(self, other: Scores, tasks: Sequence[str]) -> Change:
        first = self.scores[0]
        value = sum(other.tasks[task].value - first.tasks[task].value for task in tasks) / len(tasks)
        if not all(has_item_values(first.tasks[task], other.tasks[task]) for task in tasks):
            return Change(value)
        result = paired_bootstrap(first, other, tasks=tasks, level=self.level)
        if result.low is None or result.high is None:
            return Change(value)
        return Change(value, result.low, result.high, is_clear=result.low > 0 or result.high < 0)


def _kind(result: Sequence[TaskScore]) -> Kind:
    """By what the scores tell: answers are generated where they were looked at, or where guessing scores nothing."""
    if not all(score.not_averaged is None and 0 <= score.value <= 1 for score in result):
        return "other"
    if any(score.written or score.outputs or score.chance == 0 for score in result):
        return "generation"
    return "choice"


def _mean(scores: Sequence[TaskScore]) -> Estimate:
    """Plain mean over tasks, which count as independent."""
    errors = [score.stderr for score in scores if score.stderr is not None and math.isfinite(score.stderr)]
    stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return Estimate(sum(score.value for score in scores) / len(scores), stderr)


def is_right_or_wrong(score: TaskScore) -> bool:
    """Whether each item is one or the other, so that it can flip."""
    return score.higher_is_better and bool(score.items) and set(score.items.values()) <= {0.0, 1.0}


def flips(first: TaskScore, second: TaskScore) -> Flips | None:
    """How many items changed sides; None for graded metrics. Raises `EvaluationError` as `mcnemar`."""
    if not (is_right_or_wrong(first) and is_right_or_wrong(second)):
        return None
    test = mcnemar(first, second)
    num_both = sum(value == 1 == second.items[item] for item, value in first.items.items())
    num_neither = len(first.items) - num_both - test.only_first - test.only_second
    return Flips(num_both, test.only_first, test.only_second, num_neither, test.p_value)


def with_clear_ones(rows: Sequence[TaskRow]) -> tuple[TaskRow, ...]:
    """Say, for each pair of models, which tasks differ beyond chance when all of them are tested at once."""
    columns = []
    for changes in zip(*(row.changes for row in rows), strict=True):
        tested = {i: change.flips.p_value for i, change in enumerate(changes) if change.flips is not None}
        fallen = rejected_by_holm(tested, SURE)
        columns.append([replace(change, is_clear=i in fallen) for i, change in enumerate(changes)])
    return tuple(replace(row, changes=own) for row, own in zip(rows, zip(*columns, strict=True), strict=True))


def rejected_by_holm(p_values: Mapping[int, float], alpha: float) -> set[int]:
    """Of several hypotheses those that fall while the chance of a single false rejection is at most `alpha`.

    Holm (1979), A simple sequentially rejective multiple test procedure: the i-th smallest of m p-values, i from 0,
    falls if it and all smaller ones are at most alpha / (m - i).
    """
    fallen: set[int] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > alpha / (len(p_values) - rank):
            break
        fallen.add(name)
    return fallen
