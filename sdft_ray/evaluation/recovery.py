"""Recovery: how much of the teacher's score a student has kept, with standard errors.

Recovery over several tasks is the ratio of mean scores, mean(student) / mean(teacher) (arXiv:2410.09982), not
the mean of ratios, which a task near zero would rule. With chance correction c is taken off both: (S - c) /
(T - c).

Standard errors are by the delta method for a ratio r = S / T,

    var(r) = (var(S) + r^2 var(T) - 2 r cov(S, T)) / T^2,

and paired: teacher and student answer the same items, so cov(S, T) = corr(items) se(S) se(T). Without values
per item on both sides the covariance counts as 0, which overstates the error. Tasks count as independent.
What varies is the choice of items; the spread between training seeds is not in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import sqrt

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.estimate import Estimate
from sdft_ray.statistics.scores import Scores, TaskScore


@dataclass(frozen=True)
class Recovery:
    """What a student kept of its teacher.

    `tasks` has one ratio per task. `mean` is the ratio of mean scores over all tasks, `tuned` and
    `off_domain` the same over the tasks that were and were not tuned on (None where there are none). `min` is
    the smallest ratio, of `min_task`, with that task's own error: as the smallest of several it is biased
    downwards. `teacher_mean`, `student_mean`, and the same off-domain, are the mean scores themselves, not
    corrected for chance. `left_out` are tasks that no ratio can be built of: lower is better, their scale is not
    known, or their chance level is unknown and asked for.
    """

    tasks: dict[str, Estimate]
    mean: Estimate
    min: Estimate
    min_task: str | None
    tuned: Estimate | None
    off_domain: Estimate | None
    teacher_mean: Estimate
    student_mean: Estimate
    teacher_off_domain_mean: Estimate | None
    student_off_domain_mean: Estimate | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """Teacher and student on one task, or their means over several: scores, variances and covariance."""

    teacher: float
    student: float
    var_teacher: float | None
    var_student: float | None
    cov: float | None


def recovery(
    teacher: Scores, student: Scores, *, tuned: Collection[str] = (), chance_corrected: bool = False
) -> Recovery:
    """Compare a student with its teacher; `tuned` names the tasks of the fine-tuning set's kind.

    Corrected for chance, a task on which the teacher is within two standard errors of guessing has no ratio, since its
    denominator may be nothing; it counts in the means.

    Raises `EvaluationError` unless both have the same tasks with the same metrics.
    """
    _check_same(teacher, student)
    plain: dict[str, _Pair] = {}
    for name, score in teacher.tasks.items():
        if score.not_averaged is None and student.tasks[name].not_averaged is None:
            plain[name] = _pair(score, student.tasks[name])
    pairs = dict(plain)
    if chance_corrected:
        pairs = {}
        for name, pair in plain.items():
            chance = teacher.tasks[name].chance
            if chance is not None:
                pairs[name] = _shifted(pair, chance)
    ratios = {name: _ratio(pair if not chance_corrected or _is_clear(pair) else None) for name, pair in pairs.items()}
    known = {name: ratio.value for name, ratio in ratios.items() if ratio.value is not None}
    min_task = min(known, key=lambda name: known[name]) if known else None
    inside = [name for name in pairs if name in tuned]
    outside = [name for name in pairs if name not in tuned]
    off_domain = _mean([plain[name] for name in plain if name not in tuned])
    overall = _mean(list(plain.values()))
    return Recovery(
        tasks=ratios,
        mean=_ratio(_mean(list(pairs.values()))),
        min=ratios[min_task] if min_task is not None else _NOTHING,
        min_task=min_task,
        tuned=_ratio(_mean([pairs[name] for name in inside])) if inside else None,
        off_domain=_ratio(_mean([pairs[name] for name in outside])) if outside else None,
        teacher_mean=_estimate(overall.teacher, overall.var_teacher) if overall else _NOTHING,
        student_mean=_estimate(overall.student, overall.var_student) if overall else _NOTHING,
        teacher_off_domain_mean=_estimate(off_domain.teacher, off_domain.var_teacher) if off_domain else None,
        student_off_domain_mean=_estimate(off_domain.student, off_domain.var_student) if off_domain else None,
        left_out=tuple(name for name in teacher.tasks if name not in pairs),
    )


_NOTHING = Estimate(None, None)


def _check_same(teacher: Scores, student: Scores) -> None:
    stray = sorted(set(teacher.tasks) ^ set(student.tasks))
    if stray:
        raise EvaluationError(
            f"only one of the two models was scored on {stray[0]!r}", "evaluate both on the same tasks"
        )
    for name, score in teacher.tasks.items():
        other = student.tasks[name]
        if (score.metric, score.filter, score.num_fewshot) != (other.metric, other.filter, other.num_fewshot):
            raise EvaluationError(
                f"the two models were scored with different settings on {name!r}",
                "evaluate both with the same settings",
            )


def _pair(teacher: TaskScore, student: TaskScore) -> _Pair:
    se_teacher, se_student = teacher.stderr, student.stderr
    if se_teacher is None or se_student is None:
        return _Pair(teacher.value, student.value, _square(se_teacher), _square(se_student), None)
    paired = bool(teacher.items) and teacher.items.keys() == student.items.keys()
    correlation = (
        _correlation([teacher.items[i] for i in teacher.items], [student.items[i] for i in teacher.items])
        if paired
        else 0.0
    )
    return _Pair(teacher.value, student.value, se_teacher**2, se_student**2, correlation * se_teacher * se_student)


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's, 0 when either does not vary."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    xx = sum((a - mean_x) ** 2 for a in x)
    yy = sum((b - mean_y) ** 2 for b in y)
    return xy / sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0


def _shifted(pair: _Pair, chance: float) -> _Pair:
    return _Pair(pair.teacher - chance, pair.student - chance, pair.var_teacher, pair.var_student, pair.cov)


def _is_clear(pair: _Pair) -> bool:
    """Whether the teacher has something to keep, beyond its error."""
    return pair.var_teacher is None or pair.teacher > 2 * sqrt(pair.var_teacher)


def _mean(pairs: Sequence[_Pair]) -> _Pair | None:
    if not pairs:
        return None
    count = len(pairs)

    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / count**2 if len(known) == count else None

    return _Pair(
        teacher=sum(pair.teacher for pair in pairs) / count,
        student=sum(pair.student for pair in pairs) / count,
        var_teacher=total([pair.var_teacher for pair in pairs]),
        var_student=total([pair.var_student for pair in pairs]),
        cov=total([pair.cov for pair in pairs]),
    )


def _ratio(pair: _Pair | None) -> Estimate:
    """Student over teacher; undefined where the teacher has nothing to keep."""
    if pair is None or pair.teacher <= 0:
        return _NOTHING
    ratio = pair.student / pair.teacher
    if pair.var_teacher is None or pair.var_student is None or pair.cov is None:
        return Estimate(ratio, None)
    variance = pair.var_student + ratio**2 * pair.var_teacher - 2 * ratio * pair.cov
    return Estimate(ratio, sqrt(max(0.0, variance)) / pair.teacher)


def _estimate(value: float, variance: float | None) -> Estimate:
    return Estimate(value, None if variance is None else sqrt(variance))


def _square(value: float | None) -> float | None:
    return None if value is None else value**2
