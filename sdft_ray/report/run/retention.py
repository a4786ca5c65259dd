"""The retention cards of a run's students, judged by the release bounds of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.card import Card, retention_card
from sdft_ray.evaluation.release import Bounds, Judgement, judge
from sdft_ray.recipe.scoring import Release
from sdft_ray.report.run.model import PRUNED, TEACHER, BestVsNext, Retention
from sdft_ray.report.run.words import not_comparable
from sdft_ray.statistics.paired import paired_bootstrap
from sdft_ray.statistics.scores import Scores


def retention(scores: Mapping[str, Scores], tuned: Collection[str], release: Release | None) -> Retention:
    """Of every model that was evaluated beside teacher and pruned model; empty where one of these was not."""
    if TEACHER not in scores or PRUNED not in scores:
        return Retention()
    cards: dict[str, Card] = {}
    incomparable: dict[str, str] = {}
    judgements: dict[str, Judgement] = {}
    for name, own in scores.items():
        if name in (TEACHER, PRUNED):
            continue
        try:
            cards[name] = retention_card(scores[TEACHER], scores[PRUNED], own, tuned=tuned)
        except EvaluationError as reason:
            incomparable[name] = reason.message
    if release is not None:
        bounds = Bounds(**release.model_dump())
        judgements = {name: judge(card, bounds) for name, card in cards.items()}
        judgements |= {name: Judgement(False, (not_comparable(name, why),)) for name, why in incomparable.items()}
    return Retention(
        students=cards,
        incomparable=incomparable,
        judgements=judgements,
        bounds=_in_words(release),
        lead=_lead(scores, cards),
    )


def _in_words(release: Release | None) -> tuple[str, ...]:
    if release is None:
        return ()
    words = []
    if release.min_recovery is not None:
        words.append(f"mean recovery at least {100 * release.min_recovery:.4g} %")
    if release.min_task_recovery is not None:
        words.append(f"recovery on every task at least {100 * release.min_task_recovery:.4g} %")
    if release.no_task_below_pruned:
        words.append("no task worse, beyond chance, than after pruning alone")
    return tuple(words)


def _lead(scores: Mapping[str, Scores], cards: Mapping[str, Card]) -> BestVsNext | None:
    """Over all tasks where higher is better; None with fewer than two students, or without values per item."""
    means = {name: card.recovery.mean.value for name, card in cards.items()}
    ranked = sorted((name for name in means if means[name] is not None), key=lambda name: -(means[name] or 0.0))
    if len(ranked) < 2:
        return None
    best, next_best = ranked[:2]
    try:
        difference = paired_bootstrap(scores[next_best], scores[best])
    except EvaluationError:
        return None
    return BestVsNext(best=best, next_best=next_best, difference=difference)
