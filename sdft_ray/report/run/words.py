"""What the page and the table both say: means over families, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.report.run.kept_words import ahead, incomparable, truncated
from sdft_ray.report.run.model import PRUNED, TEACHER, Ratio, ReportData, Score
from sdft_ray.report.toolbox.numbers import percent, percent_error
from sdft_ray.report.toolbox.words import Words


@dataclass(frozen=True)
class Group:
    """Families that are read together."""

    name: str
    tasks: tuple[str, ...]


TUNED, OFF_DOMAIN = "Tuned families", "Off-domain"


def groups(data: ReportData) -> tuple[Group, ...]:
    """Tuned families apart from all others; one unnamed group where all are of one kind."""
    tuned = tuple(task for task in data.tasks if task in data.tuned_families)
    others = tuple(task for task in data.tasks if task not in data.tuned_families)
    if tuned and others:
        return Group(TUNED, tuned), Group(OFF_DOMAIN, others)
    return (Group("", data.tasks),) if data.tasks else ()


def mean_score(data: ReportData, model: str, tasks: Sequence[str]) -> Score | None:
    """Plain mean over tasks, with the standard error of independent tasks; None unless all are known."""
    found = [data.scores.get(model, {}).get(task) for task in tasks]
    known = [score for score in found if score is not None]
    if not known or len(known) < len(found):
        return None
    errors = [score.stderr for score in known if score.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(known) if len(errors) == len(known) else None
    return Score(value=sum(score.value for score in known) / len(known), stderr=stderr)


def models(data: ReportData) -> tuple[str, ...]:
    """All models that have scores or a recovery: teacher, pruned, then arms."""
    known = dict.fromkeys((TEACHER, PRUNED, *data.arm_names))
    return tuple(name for name in known if name in data.scores or name in data.recovery)


def ranked_arms(data: ReportData) -> list[tuple[str, Ratio]]:
    """Arms with a known mean recovery, the best first."""
    means = [(name, data.recovery[name].mean) for name in data.arm_names if name in data.recovery]
    known = [(name, mean) for name, mean in means if mean.value is not None]
    return sorted(known, key=lambda pair: -(pair[1].value or 0.0))


def verdict(data: ReportData) -> list[Words]:
    """One sentence with the figures that matter: size and recovery per arm, each with its standard error."""
    size: list[Words] = []
    if data.sizes is not None:
        before, after = data.sizes.teacher.num_parameters, data.sizes.pruned.num_parameters
        size = [Words(f"{percent(1 - after / before)} fewer parameters", strong=True)]
    recovered = ranked_arms(data)
    if not recovered:
        return [*size, Words("; no student was evaluated." if size else "No student was evaluated.")]
    if PRUNED in data.recovery:
        recovered.append((PRUNED, data.recovery[PRUNED].mean))
    said = [Words("With "), *size, Words(", ")] if size else []
    for position, (name, mean) in enumerate(recovered):
        if position:
            said.append(Words(" and " if position == len(recovered) - 1 else ", "))
        who = "the untuned pruned model" if name == PRUNED else name
        said.append(Words(f"{who} recovers " if position == 0 else f"{who} "))
        said.append(Words(percent_error(mean.value, mean.stderr), strong=True, model=name))
        if position == 0:
            said.append(Words(" of the teacher’s mean score"))
    return [*said, Words(".")]


def comparison(data: ReportData) -> str:
    """Whether the best two arms differ beyond chance, paired by item; "" with fewer than two, or without items."""
    return ahead(data.retention.lead)


def overlap(data: ReportData) -> str:
    """What became of seed rows that share words with a test question, in a sentence; "" where nothing is known."""
    found = data.decontamination
    if found is None:
        return ""
    if not found.ngram:
        return f"The {found.num_rows:,} seed rows were not compared with the test questions."
    num = found.num_contaminated
    share, hold, were = ("shares", "holds", "was") if num == 1 else ("share", "hold", "were")
    said = (
        f"{num:,} of {found.num_rows:,} seed rows {share} {found.ngram} words in a row with one of the "
        f"{found.num_questions:,} test questions, or {hold} a shorter one whole"
    )
    return f"{said}, and {were} left out." if num else f"{said}."


def warnings(data: ReportData) -> list[str]:
    """What a reader must know before believing the verdict."""
    failed = [f"The gate “{gate.name}” does not hold ({gate.bound})." for gate in data.gates if not gate.passed]
    return [*failed, *incomparable(data.retention), *truncated(data.truncation)]
