"""What an evaluation can tell: the smallest difference of two models that it will likely show, before it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from sdft_ray.evaluation.task_plans import tasks_of
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.graph import State
from sdft_ray.stages.names import by_label
from sdft_ray.stages.sources import task_places
from sdft_ray.statistics.detectable import ASSUMED_DISCORDANT, LEVEL, POWER, detectable_difference
from sdft_ray.statistics.flips import flips
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store


@dataclass(frozen=True)
class Detectable:
    """Differences of accuracy in [0, 1], at the usual power and level.

    `num_items` is by task, None where it is unknown; `is_limit`: it is the recipe's limit, and a task may have fewer.
    `discordant` is the share of items that exactly one of two models gets right; `num_pairs` counts the pairs of models
    that it was measured on, 0: it is assumed. `mean` is for the mean over tasks, `smallest` for the task with the
    fewest items; None where a number of items is unknown, or where even that share would not be seen.
    """

    num_items: dict[str, int | None]
    is_limit: bool
    discordant: float
    num_pairs: int
    mean: float | None
    smallest: float | None
    power: float = POWER
    level: float = LEVEL


def detectable(recipe: Recipe, store: Store, states: Mapping[str, State]) -> Detectable:
    """Of the recipe's evaluation, by what of it is in the store. Raises `EvaluationError` for an unknown task."""
    manifests = {name: state.manifest for name, state in states.items() if state.manifest is not None}
    evaluated = by_label(manifests, "evaluate")
    counted = next((own.summary["scores"] for own in evaluated.values() if "scores" in own.summary), None)
    num_items = _limits(recipe) if counted is None else {name: score["n"] for name, score in counted.items()}
    share, num_pairs = _measured(_scores(store, evaluated))
    known = [number for number in num_items.values() if number is not None]
    whole = known if len(known) == len(num_items) else []
    return Detectable(
        num_items,
        counted is None,
        share,
        num_pairs,
        detectable_difference(whole, share) if whole else None,
        detectable_difference([min(known)], share) if known else None,
    )


def _scores(store: Store, evaluated: Mapping[str, Manifest]) -> dict[str, Scores]:
    """By model, with their items, of a store on this machine; nothing is downloaded for a plan of work."""
    if not store.is_local:
        return {}
    paths = {model: store.path(own.address) / files.SCORES for model, own in evaluated.items()}
    return {
        model: Scores.from_json(json.loads(path.read_text(encoding="utf-8")))
        for model, path in paths.items()
        if path.is_file()
    }


def _limits(recipe: Recipe) -> dict[str, int | None]:
    """Items by task as the recipe limits them: those of a group add up."""
    asked = recipe.evaluate
    limits = {task.name: asked.limit.get(task.name) if isinstance(asked.limit, dict) else asked.limit
              for task in asked.tasks}  # fmt: skip
    limited = [name for name, limit in limits.items() if limit is not None]
    plans = task_places(recipe).library().plans(limited) if limited else {}
    return {name: None if limit is None else limit * len(list(tasks_of(plans[name]))) for name, limit in limits.items()}


def _measured(scores: Mapping[str, Scores]) -> tuple[float, int]:
    """The mean over pairs of models that are compared: students and pruned model, else with the teacher too."""
    models = [name for name in scores if name != "teacher"]
    pairs = list(combinations(models if len(models) > 1 else list(scores), 2))
    found = [
        changed.share
        for one, other in pairs
        if (changed := flips((score, scores[other].tasks[name]) for name, score in scores[one].tasks.items()))
    ]
    share = sum(found) / len(found) if found else 0.0
    return (share, len(found)) if share > 0 else (ASSUMED_DISCORDANT, 0)
