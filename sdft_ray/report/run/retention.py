"""From scores to what students kept: the retention card of each, held against the bounds of the recipe."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.card import CapabilityCard, Card, Comparison, TaskCard, retention_card
from sdft_ray.evaluation.recovery import Estimate, Recovery
from sdft_ray.evaluation.release import Bounds, judge
from sdft_ray.recipe.recipe import Recipe, Release
from sdft_ray.report.run.kept_model import (
    Answers,
    Beside,
    Bounded,
    Figure,
    Judgement,
    Kept,
    KeptCapability,
    KeptTask,
    Lead,
    Overall,
    Retention,
    Truncation,
)
from sdft_ray.report.run.model import PRUNED, TEACHER
from sdft_ray.report.run.training import student_manifest
from sdft_ray.statistics.paired import Interval, paired_bootstrap
from sdft_ray.statistics.scores import Scores
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store


def retention(scores: Mapping[str, Scores], tuned: Collection[str], release: Release | None) -> Retention:
    """Of every model that was evaluated beside teacher and pruned model; empty where one of these was not."""
    if TEACHER not in scores or PRUNED not in scores:
        return Retention()
    cards: dict[str, Card] = {}
    incomparable: dict[str, str] = {}
    for name, own in scores.items():
        if name in (TEACHER, PRUNED):
            continue
        try:
            cards[name] = retention_card(scores[TEACHER], scores[PRUNED], own, tuned=tuned)
        except EvaluationError as reason:
            incomparable[name] = reason.message
    judgements = {}
    if release is not None:
        bounds = Bounds(**release.model_dump())
        for name in (*cards, *incomparable):
            judgements[name] = _judgement(cards[name], bounds) if name in cards else _unknown(incomparable[name])
    return Retention(
        students={name: _kept(card) for name, card in cards.items()},
        incomparable=incomparable,
        judgements=judgements,
        bounds=_in_words(release),
        lead=_lead(scores, cards),
    )


def _judgement(card: Card, bounds: Bounds) -> Judgement:
    found = judge(card, bounds)
    return Judgement(releasable=found.releasable, reasons=found.reasons)


def _unknown(why: str) -> Judgement:
    return Judgement(releasable=False, reasons=(f"What it kept cannot be told: {why}.",))


def _in_words(release: Release | None) -> tuple[str, ...]:
    if release is None:
        return ()
    told = []
    if release.min_recovery is not None:
        told.append(f"mean recovery at least {100 * release.min_recovery:.4g} %")
    if release.min_task_recovery is not None:
        told.append(f"recovery on every task at least {100 * release.min_task_recovery:.4g} %")
    if release.no_task_below_pruned:
        told.append("no task worse, beyond chance, than after pruning alone")
    return tuple(told)


def _lead(scores: Mapping[str, Scores], cards: Mapping[str, Card]) -> Lead | None:
    """Over all tasks where higher is better; None with fewer than two students, or without values per item."""
    means = {name: card.recovery.mean.value for name, card in cards.items()}
    ranked = sorted((name for name in means if means[name] is not None), key=lambda name: -(means[name] or 0.0))
    if len(ranked) < 2:
        return None
    best, next_best = ranked[:2]
    try:
        found = paired_bootstrap(scores[next_best], scores[best])
    except EvaluationError:
        return None
    return Lead(best=best, next_best=next_best, difference=_bounded(found))


# --- from the card to what is shown -------------------------------------------------------------------------


def _kept(card: Card) -> Kept:
    return Kept(
        tasks=tuple(_task(task) for task in card.tasks),
        capabilities=tuple(_capability(part) for part in card.capabilities),
        recovery=_overall(card.recovery, card.recovery_interval, card.left_out),
        chance_corrected=_overall(
            card.chance_corrected,
            card.chance_corrected_interval,
            tuple(task for task in card.chance_corrected.left_out if task not in card.left_out),
        ),
        pruned=_figure(card.pruned_recovery),
        reversals={reversal.task: reversal.is_beyond_chance for reversal in card.reversals},
    )


def _task(card: TaskCard) -> KeptTask:
    values = [score.value for score in (card.teacher, card.pruned, card.student)]
    return KeptTask(
        task=card.task,
        metric=card.metric,
        num_items=card.num_items,
        is_generative=card.is_generative,
        is_tuned=card.is_tuned,
        is_share=card.higher_is_better and all(value is None or 0 <= value <= 1 for value in values),
        is_right_or_wrong=card.from_teacher.test is not None and card.from_pruned.test is not None,
        teacher=_figure(card.teacher),
        pruned=_figure(card.pruned),
        student=_figure(card.student),
        recovery=_figure(card.recovery),
        chance_corrected=_figure(card.chance_corrected),
        from_teacher=_beside(card.from_teacher),
        from_pruned=_beside(card.from_pruned),
        answers={model: Answers(**asdict(written)) for model, written in card.written.items()},
    )


def _capability(card: CapabilityCard) -> KeptCapability:
    return KeptCapability(
        capability=card.capability,
        is_generative=card.is_generative,
        tasks=card.tasks,
        teacher=_figure(card.teacher),
        pruned=_figure(card.pruned),
        student=_figure(card.student),
        recovery=_figure(card.recovery),
    )


def _overall(found: Recovery, interval: Interval | None, left_out: tuple[str, ...]) -> Overall:
    return Overall(
        mean=_figure(found.mean),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        min=_figure(found.min),
        min_task=found.min_task,
        left_out=left_out,
    )


def _beside(found: Comparison) -> Beside:
    interval = found.interval
    return Beside(
        value=found.difference,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        p_value=found.test.p_value if found.test else None,
    )


def _bounded(interval: Interval) -> Bounded:
    return Bounded(value=interval.value, low=interval.low, high=interval.high)


def _figure(estimate: Estimate) -> Figure:
    return Figure(value=estimate.value, stderr=estimate.stderr)


# --- prompts that lost their beginning ----------------------------------------------------------------------


def truncation(
    recipe: Recipe, store: Store, manifests: Mapping[str, Manifest], scores: Mapping[str, Scores]
) -> Truncation | None:
    """The most of any model, as all are asked the same; None where all prompts were read whole."""
    tasks: dict[str, int] = {}
    for own in scores.values():
        for task, score in own.tasks.items():
            if score.num_truncated:
                tasks[task] = max(score.num_truncated, tasks.get(task, 0))
    return Truncation(tasks=tasks, context_tokens=_context(recipe, store, manifests)) if tasks else None


def _context(recipe: Recipe, store: Store, manifests: Mapping[str, Manifest]) -> int | None:
    """By the configuration of a student, which is the teacher's in this, and by what the evaluation was allowed."""
    allowed = [made.resources.get("max_model_tokens") for made in manifests.values() if made.stage == "evaluate"]
    student = next((made for arm in recipe.train.arms if (made := student_manifest(manifests, arm))), None)
    config = store.path(student.address) / "config.json" if student else None
    if config is not None and config.exists():
        told: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        allowed.append({**told, **told.get("text_config", {})}.get("max_position_embeddings"))
    return min((tokens for tokens in allowed if tokens), default=None)
