"""From the artifacts of trainings to values: students, grids of trials, and the teacher's correction."""

from __future__ import annotations

from collections.abc import Mapping

from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.model import Correction, Grid, TrialRow
from sdft_ray.store.manifest import Manifest


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
    asked = recipe.teacher_correction
    trained, measured = manifests.get("correct:teacher"), manifests.get("gap:corrected")
    if asked is None or trained is None or measured is None:
        return None
    figures = {name: measured.summary[name] for name in ("num_rows", "nll", "changes", "verdict")}
    return Correction(
        data=asked.data,
        learning_rate=asked.learning_rate,
        num_steps=trained.summary["num_steps"],
        held_out=recipe.train.validation_fraction > 0,
        **figures,
    )
