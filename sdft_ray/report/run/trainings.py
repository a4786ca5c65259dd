"""How the students of a run were trained: settings in words, chosen rates, losses and costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.recipe.arms import Objective
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.model import PATCHED, Arm, Correction, Cost, Grid, LossPoint, TrialRow
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

TERM_NAMES = {
    "cross_entropy": "cross-entropy",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon",
    "top_k_kl": "top-k KL",
    "hidden_cosine": "hidden-state cosine",
    "hidden_mse": "hidden-state MSE",
}
"""Terms of an objective in words."""


def arms(recipe: Recipe, chosen: Mapping[str, Grid]) -> dict[str, Arm]:
    """How each student was trained; an arm whose trial is not chosen yet has no learning rate."""
    rates = {name: trial.learning_rate for name, trial in recipe.train.trials.items()}
    rates |= {name: trial.learning_rate for name, grid in chosen.items() for trial in grid.trials if trial.chosen}
    trained = {
        name: Arm(
            data=arm.data,
            learning_rate=rates.get(name),
            objective=_in_words(arm.objective),
            num_rows=arm.num_rows,
        )
        for name, arm in recipe.train.arms.items()
    }
    merged = {
        name: Arm(data=f"{merge.kind} of {merge.arms[0]} and {merge.arms[1]} at {t:g}")
        for name, (merge, t) in recipe.merged.items()
    }
    patched = {PATCHED: Arm(data="a linear map at the cut, not tuned")} if recipe.patch else {}
    return patched | trained | merged


def _in_words(objective: Objective) -> str:
    """ "" for plain fine-tuning, else the terms with their weights: `forward KL + 0.5 cross-entropy`."""
    if objective.terms == ("cross_entropy",):
        return ""
    weights = {name: getattr(objective, name) for name in objective.terms}
    parts = [("" if w == 1 else f"{w:g} ") + TERM_NAMES[name] for name, w in weights.items()]
    cooled = f" at temperature {objective.temperature:g}" if objective.temperature != 1 else ""
    return " + ".join(parts) + cooled + (" from cached signals" if objective.cached else "")


def student_manifest(manifests: Mapping[str, Manifest], name: str) -> Manifest | None:
    """The artifact with the weights of an arm or a merge: for a grid, the chosen trial's. None when it is not there."""
    choice = manifests.get(f"choose:{name}")
    if choice is None:
        return manifests.get(f"merge:{name}", manifests.get(f"train:{name}"))
    chosen = choice.inputs[choice.summary["chosen"]]
    return next((manifest for manifest in manifests.values() if manifest.address == chosen), None)


def grids(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, Grid]:
    """Every arm of which a trial was chosen."""
    choices = {arm: manifests[f"choose:{arm}"].summary for arm in recipe.train.arms if f"choose:{arm}" in manifests}
    return {
        arm: Grid(
            trials=tuple(
                TrialRow(**outcome, chosen=role == choice["chosen"]) for role, outcome in choice["trials"].items()
            ),
            num_rows=choice["num_held_out_rows"],
            num_tokens=choice["num_held_out_tokens"],
        )
        for arm, choice in choices.items()
    }


def correction(recipe: Recipe, manifests: Mapping[str, Manifest]) -> Correction | None:
    """What correcting the teacher did to it."""
    settings = recipe.teacher_correction
    trained, measured = manifests.get("correct:teacher"), manifests.get("gap:corrected")
    if settings is None or trained is None or measured is None:
        return None
    return Correction(
        data=settings.data,
        learning_rate=settings.learning_rate,
        num_steps=trained.summary["num_steps"],
        held_out=recipe.train.validation_fraction > 0,
        **{name: measured.summary[name] for name in ("num_rows", "nll", "changes", "verdict")},
    )


def history(store: Store, trained: Manifest) -> list[dict[str, Any]]:
    """One record per step of a training."""
    path = store.path(trained.address) / files.HISTORY
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_notes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """In words; artifacts of earlier versions say nothing."""
    counts = [
        (summary.get("num_dropped", 0), "rows were left out: too long for train.max_seq_len"),
        (summary.get("num_cut", 0), "prompts were cut at their beginning to fit train.max_seq_len"),
        (
            summary.get("signals", {}).get("num_left_out", 0),
            "rows were left out: the teacher’s signals do not cover them",
        ),
    ]
    return (*(f"{number:,} {what}" for number, what in counts if number), *summary.get("notes", ()))


def losses(records: Sequence[Mapping[str, Any]]) -> tuple[LossPoint, ...]:
    """The curve of a history."""
    return tuple(LossPoint(r["step"], r["loss"], r["learning_rate"]) for r in records)


def cost(records: Sequence[Mapping[str, Any]]) -> Cost:
    """Medians and the peak of a history; those of before these figures were recorded lack them."""

    def known(name: str) -> list[Any]:
        return [record[name] for record in records if record.get(name) is not None]

    def median(name: str) -> float | None:
        return statistics.median(known(name)) if known(name) else None

    return Cost(
        tokens_per_s=median("tokens_per_s"),
        mfu=median("mfu"),
        peak_memory_bytes=max(known("peak_memory_bytes"), default=None),
    )
