"""What students kept, as tables of the page: tasks with generated answers first, the best student first."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.evaluation.capabilities import OTHER
from sdft_ray.report.run.kept_model import Answers, Beside, Figure, Judgement, Kept, KeptCapability, KeptTask, Overall
from sdft_ray.report.run.kept_words import difference, interval, reversals
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.words import ranked_arms
from sdft_ray.report.toolbox.numbers import THIN, number, p_words, percent, plain
from sdft_ray.report.toolbox.words import joined

DASH = "–"
GENERATED, SCORED = "Generated answers", "Answers chosen by likelihood"


@dataclass(frozen=True)
class Cell:
    """A figure, and below it its error or interval."""

    figure: str
    below: str = ""


@dataclass(frozen=True)
class Row:
    """A task or a capability; `note` stands below its name."""

    name: str
    note: str
    cells: tuple[Cell, ...]
    is_tuned: bool = False


@dataclass(frozen=True)
class Group:
    """Tasks that are answered in one way, or the capabilities."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Fact:
    """One of the figures that stand above a student's table."""

    label: str
    figure: str
    note: str


@dataclass(frozen=True)
class AnswerRow:
    model: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class AnswerTable:
    """How generated answers look; `groups` are tasks with a row for each model."""

    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[AnswerRow, ...]], ...]


@dataclass(frozen=True)
class Student:
    """All that is shown of one. `judgement` is None where nobody judged."""

    name: str
    mean: str
    judgement: Judgement | None
    facts: tuple[Fact, ...]
    groups: tuple[Group, ...]
    reversals: tuple[tuple[str, bool], ...]
    """Sentences, and whether they are of what is beyond chance."""
    left_out: str
    answers: AnswerTable | None


def students(data: ReportData) -> list[Student]:
    """The best by mean recovery first, then those that have none."""
    known = data.retention.students
    names = dict.fromkeys([*(name for name, _ in ranked_arms(data) if name in known), *known])
    return [_student(name, known[name], data.retention.judgements.get(name)) for name in names]


def _student(name: str, kept: Kept, judgement: Judgement | None) -> Student:
    generated = tuple(_task(task, name) for task in kept.tasks if task.is_generative)
    scored = tuple(_task(task, name) for task in kept.tasks if not task.is_generative)
    shown = [Group(GENERATED, generated), Group(SCORED, scored), Group("By capability", _capabilities(kept))]
    mean = kept.recovery.mean.value
    return Student(
        name=name,
        mean=DASH if mean is None else percent(mean),
        judgement=judgement,
        facts=_facts(kept),
        groups=tuple(group for group in shown if group.rows),
        reversals=tuple(reversals(name, kept)),
        left_out=_left_out(kept),
        answers=_answers(name, kept),
    )


def _facts(kept: Kept) -> tuple[Fact, ...]:
    """The mean with its interval, beside it the worst task, both also chance-corrected."""
    facts = [*_overall("Mean recovery", "Worst task", kept.recovery)]
    if _says_more(kept):
        facts += _overall("Chance-corrected", "Worst of these", kept.chance_corrected)
    before = kept.pruned
    note = "" if before.stderr is None else f"±{THIN}{number(100 * before.stderr, 1)}"
    return (*facts, Fact("After pruning", DASH if before.value is None else percent(before.value), note))


def _says_more(kept: Kept) -> bool:
    """Whether guessing scores something on some task."""
    return kept.chance_corrected.mean.value is not None and kept.chance_corrected.mean != kept.recovery.mean


def _overall(mean: str, worst: str, found: Overall) -> list[Fact]:
    ends = "no interval" if found.low is None or found.high is None else f"{_share(found.low)} to {_share(found.high)}"
    facts = [Fact(mean, DASH if found.mean.value is None else percent(found.mean.value), ends)]
    if found.min.value is not None and found.min_task is not None:
        facts.append(Fact(worst, percent(found.min.value), found.min_task))
    return facts


def _left_out(kept: Kept) -> str:
    lower, unknown = (joined(part.left_out) for part in (kept.recovery, kept.chance_corrected))
    said = [f"Not in the mean, as lower is better or a score is not a number: {lower}."] if lower else []
    if unknown and _says_more(kept):
        said.append(f"Not chance-corrected, as what guessing scores is not known: {unknown}.")
    return " ".join(said)


# --- tasks and capabilities ---------------------------------------------------------------------------------


def _task(task: KeptTask, name: str) -> Row:
    scores = [_score(score, is_share=task.is_share) for score in (task.teacher, task.pruned, task.student)]
    p_value = task.from_teacher.p_value
    cells = (
        *scores,
        _score(task.recovery),
        _score(task.chance_corrected),
        _beside(task.from_teacher, is_share=task.is_share),
        Cell(DASH if p_value is None else p_words(p_value)),
        _beside(task.from_pruned, is_share=task.is_share),
    )
    return Row(task.task, f"{task.metric}, {task.num_items:,} items", cells, task.is_tuned)


def _capabilities(kept: Kept) -> tuple[Row, ...]:
    """Empty where every task has a capability to itself, or none is known."""
    if all(len(part.tasks) == 1 for part in kept.capabilities):
        return ()
    if all(part.capability == OTHER for part in kept.capabilities):
        return ()
    return tuple(_capability(part, kept.capabilities) for part in kept.capabilities)


def _capability(part: KeptCapability, every: tuple[KeptCapability, ...]) -> Row:
    twice = sum(other.capability == part.capability for other in every) > 1
    how = ("generated" if part.is_generative else "by likelihood") if twice else ""
    num = f"{len(part.tasks)} task{'s' if len(part.tasks) != 1 else ''}"
    scores = [_score(score) for score in (part.teacher, part.pruned, part.student, part.recovery)]
    return Row(part.capability, f"{num}, {how}" if how else num, tuple(scores))


def _score(score: Figure, *, is_share: bool = True) -> Cell:
    if score.value is None:
        return Cell(DASH)
    shown = _share if is_share else plain
    return Cell(shown(score.value), "" if score.stderr is None else f"±{THIN}{shown(score.stderr)}")


def _share(value: float) -> str:
    return number(100 * value, 1)


def _beside(found: Beside, *, is_share: bool) -> Cell:
    return Cell(difference(found, is_share=is_share), interval(found, is_share=is_share) or DASH)


# --- how answers look ---------------------------------------------------------------------------------------


def _answers(name: str, kept: Kept) -> AnswerTable | None:
    """None where no task asked for a generated answer, or nobody looked at them."""
    tasks = [task for task in kept.tasks if task.answers]
    if not tasks:
        return None
    ks = sorted({int(k) for task in tasks for own in task.answers.values() for k in own.pass_at_k})
    groups = []
    for task in tasks:
        cells = {model: _answer_cells(task, score, task.answers.get(model), ks) for model, score in task.scores.items()}
        rows = [AnswerRow(name if model == "student" else model, own) for model, own in cells.items()]
        groups.append((task.task, tuple(rows)))
    sampled = [f"pass@{k}" if k > 1 else "pass@1, sampled" for k in ks]
    return AnswerTable(("pass@1", *sampled, "wrong", "no answer", "cut off", "repeated", "tokens"), tuple(groups))


def _answer_cells(task: KeptTask, score: Figure, own: Answers | None, ks: list[int]) -> tuple[str, ...]:
    right = DASH if score.value is None else _share(score.value) if task.is_share else plain(score.value)
    if own is None:
        return (right, *([DASH] * (len(ks) + 5)))
    found = [own.pass_at_k.get(str(k)) for k in ks]
    sampled = [DASH if value is None else _share(value) for value in found]
    shares = [_share(value) for value in (own.no_answer, own.truncated, own.repetition)]
    return (right, *sampled, _wrong(task, score, own), *shares, number(own.mean_tokens, 1))


def _wrong(task: KeptTask, score: Figure, own: Answers) -> str:
    """Answers in the right form that are not right; a dash where items are not just right or wrong."""
    if not task.is_right_or_wrong or score.value is None:
        return DASH
    rest = 1 - score.value - own.no_answer
    return _share(max(0.0, rest)) if rest > -1e-9 else DASH
