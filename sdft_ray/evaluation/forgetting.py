"""Forgetting and shift: by how much the perplexity of texts rises from the teacher to a model derived from it.

Measured on three kinds of text, by negative log-likelihood (NLL) in nats per token: held-out text that nothing is
tuned on (`text`), where a rise is what was forgotten; and references and the teacher's own rewrites of the seed set,
where training moves a student to one of the two (arXiv:2410.09982 and arXiv:2402.13669 explain forgetting by that
shift). Every model has scored the same rows, so differences are paired by row; their errors are those of
`sdft_ray.evaluation.shift`. With d the difference on held-out text, exp(d) is the ratio of perplexities, and its
standard error exp(d) se(d) (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.shift import ResponseNll, figure, mean_nll, paired_gap
from sdft_ray.statistics.estimate import Estimate

TEACHER, PRUNED, HELD_OUT = "teacher", "pruned", "text"
NAMES = {HELD_OUT: "held-out text", "reference": "references", "distilled": "the teacher's rewrites"}
"""Names of the kinds of text, as shown to users."""

Rows = Mapping[str, Mapping[str, Mapping[str, ResponseNll]]]
"""Model -> kind of text -> row id -> the NLL of that row under the model."""


@dataclass(frozen=True)
class Forgetting:
    """By model, then kind of text: mean NLL in nats per token, and by how much it exceeds that of another model.

    `to_teacher` has all models but the teacher, `to_pruned` all that were made from the pruned one; it is empty
    without that. Above 0 the model is the more surprised one. `perplexity_ratio` is over the teacher's, on held-out
    text. Standard errors are over rows, None with a single one.
    """

    num_rows: dict[str, int]
    nll: dict[str, dict[str, Estimate]]
    to_teacher: dict[str, dict[str, Estimate]]
    to_pruned: dict[str, dict[str, Estimate]]
    perplexity_ratio: dict[str, Estimate]


@dataclass(frozen=True)
class Likeness:
    """How similar a model's answers are to the teacher's: cosines of sentence embeddings, in [-1, 1].

    `mean` is over `num_answers` pairs, and 5 % of them do not exceed `low`, which is None without pairs. `num_empty`
    pairs have at least one empty answer, `num_cut` one that was cut.
    """

    num_answers: int
    mean: Estimate
    low: float | None
    num_empty: int = 0
    num_cut: int = 0


def forgetting(rows: Rows) -> Forgetting:
    """Means and differences from the NLL of every row under every model, the teacher included.

    Kinds of text without rows may be absent. Raises `EvaluationError` unless all models have scored the same rows.
    """
    texts = {text: list(of_teacher) for text, of_teacher in rows[TEACHER].items() if of_teacher}
    lists = {model: {text: _joined(rows, model, text, names) for text, names in texts.items()} for model in rows}
    to_teacher = {model: _beyond(lists, model, TEACHER) for model in rows if model != TEACHER}
    students = [model for model in to_teacher if model != PRUNED] if PRUNED in rows else []
    return Forgetting(
        num_rows={text: len(names) for text, names in texts.items()},
        nll={model: {text: mean_nll(part) for text, part in parts.items()} for model, parts in lists.items()},
        to_teacher=to_teacher,
        to_pruned={model: _beyond(lists, model, PRUNED) for model in students},
        perplexity_ratio={
            m: perplexity_ratio(by_text[HELD_OUT]) for m, by_text in to_teacher.items() if HELD_OUT in by_text
        },
    )


def perplexity_ratio(difference: Estimate) -> Estimate:
    """exp of a difference in nats per token, with its error; None beyond what a float holds."""
    assert difference.value is not None
    if difference.value > 700:
        return Estimate(None, None)
    ratio = math.exp(difference.value)
    return Estimate(ratio, None if difference.stderr is None else ratio * difference.stderr)


def _joined(rows: Rows, model: str, text: str, names: Sequence[str]) -> list[ResponseNll]:
    """One model's rows in the order of the teacher's."""
    by_name = rows[model].get(text, {})
    if by_name.keys() != set(names):
        raise EvaluationError(
            f"{model} and the teacher were not scored on the same rows of {NAMES.get(text, text)}",
            "remove the folders of their forget steps and run again",
        )
    return [by_name[name] for name in names]


def _beyond(lists: Mapping[str, Mapping[str, Sequence[ResponseNll]]], model: str, base: str) -> dict[str, Estimate]:
    """By how much a model's mean exceeds that of the base."""
    return {text: paired_gap(part, lists[base][text]) for text, part in lists[model].items()}


def verdict(measured: Forgetting, text: str) -> str:
    """The effects of pruning and training on one kind of text, in sentences; "" for a kind that was not measured.

    A change counts if it exceeds two standard errors.
    """
    if text not in measured.num_rows:
        return ""
    if measured.num_rows[text] == 1:
        return f"A single row has no standard error, so nothing can be said of {NAMES[text]}: give more rows."
    sentences, lost = [], False
    if PRUNED in measured.to_teacher:
        by_pruning = measured.to_teacher[PRUNED][text]
        lost = _sign(by_pruning) > 0
        sentences.append(
            _by_pruning(by_pruning, measured.perplexity_ratio.get(PRUNED) if text == HELD_OUT else None, text)
        )
    for model, to_teacher in measured.to_teacher.items():
        if model == PRUNED:
            continue
        level = _level(to_teacher[text])
        if PRUNED in measured.to_teacher:
            sentences.append(f"{model} {_since(measured.to_pruned[model][text], lost=lost)} and {level}.")
        else:
            sentences.append(f"{model} {level}.")
    return " ".join(sentences)


def _by_pruning(change: Estimate, ratio: Estimate | None, text: str) -> str:
    sign = _sign(change)
    if not sign:
        return f"Pruning made {NAMES[text]} neither more nor less surprising within two standard errors."
    times = f" (perplexity × {ratio.value:.3g})" if ratio is not None and ratio.value is not None else ""
    kind = "more" if sign > 0 else "less"
    sentence = f"Pruning made {NAMES[text]} {_size(change)} nats per token {kind} surprising{times}"
    return f"{sentence}, beyond two standard errors."


def _since(change: Estimate, *, lost: bool) -> str:
    """The change after pruning, as a verb with its object."""
    sign = _sign(change)
    if not sign:
        return "changed nothing measurable"
    if sign < 0:
        return f"{'gave back' if lost else 'came nearer by'} {_size(change)}"
    return f"{'took a further' if lost else 'lost'} {_size(change)}"


def _level(beyond: Estimate) -> str:
    sign = _sign(beyond)
    if not sign:
        return "is level with the teacher within two standard errors"
    return f"{'stays' if sign > 0 else 'is'} {_size(beyond)} {'above' if sign > 0 else 'below'} the teacher"


def _sign(change: Estimate) -> int:
    """1 or -1 beyond two standard errors, else 0."""
    assert change.value is not None
    assert change.stderr is not None
    return 0 if abs(change.value) <= 2 * change.stderr else int(math.copysign(1, change.value))


def _size(change: Estimate) -> str:
    assert change.value is not None
    return figure(Estimate(abs(change.value), change.stderr))
