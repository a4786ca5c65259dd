"""What each student kept, for the page: facts, a table task by task, and how its answers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.evaluation.capabilities import OTHER
from sdft_ray.evaluation.card import CapabilityCard, Card, Comparison, TaskCard
from sdft_ray.evaluation.recovery import Recovery
from sdft_ray.evaluation.release import Judgement
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.words import difference, groups, interval, is_share, percents, ranked_arms, reversals
from sdft_ray.report.toolbox.numbers import number, p_words, percent, plain
from sdft_ray.report.toolbox.table import DASH, Cell, Group, Row, Table, estimate, fact, names, share
from sdft_ray.report.toolbox.words import joined
from sdft_ray.statistics.estimate import Estimate, Interval
from sdft_ray.statistics.flips import Flips
from sdft_ray.statistics.scores import GenerationStats

GENERATED, SCORED = "Generated answers", "Answers chosen by likelihood"


@dataclass(frozen=True)
class Student:
    """`facts` are (label, figure, note), `reversals` sentences and whether they hold beyond chance.

    `judgement` is None where the recipe has no bounds, `answers` where no task has generated answers.
    """

    name: str
    mean: str
    judgement: Judgement | None
    facts: tuple[tuple[str, str, str], ...]
    tasks: Table
    reversals: tuple[tuple[str, bool], ...]
    left_out: str
    answers: Table | None


def students(data: ReportData) -> list[Student]:
    """The best by mean recovery first, then those that have none."""
    known = data.retention.students
    order = dict.fromkeys([*(name for name, _ in ranked_arms(data) if name in known), *known])
    return [_student(name, known[name], data) for name in order]


def _student(name: str, card: Card, data: ReportData) -> Student:
    return Student(
        name=name,
        mean=fact(card.recovery.mean),
        judgement=data.retention.judgements.get(name),
        facts=_facts(card),
        tasks=_tasks(name, card, mark_tuned=len(groups(data)) > 1),
        reversals=tuple(reversals(name, card)),
        left_out=_left_out(card),
        answers=_answers(name, card),
    )


def _facts(card: Card) -> tuple[tuple[str, str, str], ...]:
    """The mean with its interval, beside it the worst task, both also corrected for chance."""
    facts = _overall("Mean recovery", "Worst task", card.recovery, card.recovery_interval)
    if _says_more(card):
        facts += _overall("Chance-corrected", "Worst of these", card.chance_corrected, card.chance_corrected_interval)
    facts.append(("After pruning", fact(card.pruned_recovery), estimate(card.pruned_recovery).note))
    return (*facts, *_flips(card))


def _flips(card: Card) -> list[tuple[str, str, str]]:
    """Items that the teacher gets right and the student does not, and the reverse, as shares of all."""
    if card.flips is None:
        return []
    lost, gained = card.flips.right_to_wrong, card.flips.wrong_to_right
    return [
        ("Right to wrong", percent(lost.value or 0.0), f"{percents(lost)} of {card.flips.num_items:,} items"),
        ("Wrong to right", percent(gained.value or 0.0), f"{percents(gained)}, from teacher to student"),
    ]


def _says_more(card: Card) -> bool:
    """Whether guessing scores something on some task."""
    return card.chance_corrected.mean.value is not None and card.chance_corrected.mean != card.recovery.mean


def _overall(mean: str, worst: str, result: Recovery, limits: Interval | None) -> list[tuple[str, str, str]]:
    known = limits is not None and limits.low is not None and limits.high is not None
    ends = f"{share(limits.low or 0)} to {share(limits.high or 0)}" if known and limits else "no interval"
    facts = [(mean, fact(result.mean), ends)]
    return facts + (
        [(worst, fact(result.min), result.min_task)] if result.min.value is not None and result.min_task else []
    )


def _left_out(card: Card) -> str:
    whys = {task.task: task.not_averaged or "a score is not a number" for task in card.tasks}
    lower = joined([f"{name} ({whys[name]})" for name in card.left_out])
    unknown = joined([task for task in card.chance_corrected.left_out if task not in card.left_out])
    words = [f"Not in the mean: {lower}."] if lower else []
    if unknown and _says_more(card):
        words.append(f"Not chance-corrected, as what guessing scores is not known: {unknown}.")
    return " ".join(words)


# --- tasks and capabilities ---------------------------------------------------------------------------------


def _tasks(name: str, card: Card, *, mark_tuned: bool) -> Table:
    columns = names(
        "Task", "teacher", "pruned", "student", "recovery", Cell("recovery", "corrected"),
        Cell("difference", "to teacher"), Cell("p", "lost / gained"), Cell("difference", "to pruned"),
    )  # fmt: skip
    groups = (
        Group(GENERATED, tuple(_task(task, mark_tuned) for task in card.tasks if task.is_generative)),
        Group(SCORED, tuple(_task(task, mark_tuned) for task in card.tasks if not task.is_generative)),
        Group("By capability", _capabilities(card)),
    )
    return Table(f"What {name} kept, task by task", columns, groups, "kept-tasks")


def _task(task: TaskCard, mark_tuned: bool) -> Row:
    scores = (estimate(score, is_share=is_share(task)) for score in (task.teacher, task.pruned, task.student))
    test = task.from_teacher.test
    cells = (
        *scores,
        estimate(task.recovery),
        estimate(task.chance_corrected),
        _difference(task.from_teacher, is_share(task)),
        Cell(DASH if test is None else p_words(test.p_value), "" if task.flips is None else _flipped(task.flips)),
        _difference(task.from_pruned, is_share(task)),
    )
    tag = "tuned" if task.is_tuned and mark_tuned else ""
    return Row(Cell(task.task, f"{task.metric}, {task.num_items:,} items", tag=tag), cells)


def _flipped(found: Flips) -> str:
    """Shares of items that were lost and gained against the teacher."""
    return " / ".join(share(part.value or 0.0) for part in (found.right_to_wrong, found.wrong_to_right))


def _difference(result: Comparison, is_share: bool) -> Cell:
    text = difference(result.difference, is_share=is_share)
    return Cell(text, interval(result.interval, is_share=is_share) or DASH)


def _capabilities(card: Card) -> tuple[Row, ...]:
    """Empty where every task has a capability to itself, or none is known."""
    parts = card.capabilities
    if all(len(part.tasks) == 1 for part in parts) or all(part.capability == OTHER for part in parts):
        return ()
    return tuple(_capability(part, parts) for part in parts)


def _capability(part: CapabilityCard, every: Sequence[CapabilityCard]) -> Row:
    twice = sum(other.capability == part.capability for other in every) > 1
    way = (", generated" if part.is_generative else ", by likelihood") if twice else ""
    note = f"{len(part.tasks)} task{'s' if len(part.tasks) != 1 else ''}{way}"
    return Row(
        Cell(part.capability, note), tuple(map(estimate, (part.teacher, part.pruned, part.student, part.recovery)))
    )


# --- how answers look ---------------------------------------------------------------------------------------


def _answers(name: str, card: Card) -> Table | None:
    """A row per task and model; None where there are no generated answers."""
    tasks = [task for task in card.tasks if task.written]
    if not tasks:
        return None
    ks = sorted({int(k) for task in tasks for own in task.written.values() for k in own.pass_at_k})
    groups = []
    for task in tasks:
        scores = {"teacher": task.teacher, "pruned": task.pruned, name: task.student}
        written = [task.written.get(model) for model in ("teacher", "pruned", "student")]
        pairs = zip(scores.items(), written, strict=True)
        rows = [Row(Cell(model), names(*_answer(task, score, own, ks))) for (model, score), own in pairs]
        groups.append(Group(task.task, tuple(rows)))
    sampled = (f"pass@{k}" if k > 1 else "pass@1, sampled" for k in ks)
    columns = names("How answers look", "pass@1", *sampled, "wrong", "no answer", "cut off", "repeated", "tokens")
    caption = f"How the generated answers of teacher, pruned model and {name} look"
    return Table(caption, columns, tuple(groups), "kept-answers")


def _answer(task: TaskCard, score: Estimate, own: GenerationStats | None, ks: Sequence[int]) -> tuple[str, ...]:
    right = DASH if score.value is None else share(score.value) if is_share(task) else plain(score.value)
    if own is None:
        return (right, *([DASH] * (len(ks) + 5)))
    sampled = (own.pass_at_k.get(str(k)) for k in ks)
    shares = (share(value) for value in (own.no_answer, own.truncated, own.repetition))
    return (
        right,
        *(DASH if value is None else share(value) for value in sampled),
        _wrong(task, score, own),
        *shares,
        number(own.mean_tokens, 1),
    )


def _wrong(task: TaskCard, score: Estimate, own: GenerationStats) -> str:
    """Answers in the right form that are not right; a dash where items are not just right or wrong."""
    if task.from_teacher.test is None or task.from_pruned.test is None or score.value is None:
        return DASH
    rest = 1 - score.value - own.no_answer
    return share(max(0.0, rest)) if rest > -1e-9 else DASH
