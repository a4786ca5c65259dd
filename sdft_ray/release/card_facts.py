"""What a model card says beside the report's data: where things came from, and the recipe without paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sdft_ray.data.hub import NAMED_SETS
from sdft_ray.models.licence import Licence
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.gather import read_scores
from sdft_ray.report.run.trainings import student_manifest
from sdft_ray.statistics.scores import Scores
from sdft_ray.store.manifest import FileEntry, Manifest
from sdft_ray.store.store import Store
from sdft_ray.store.urls import without_secrets

_CACHED = re.compile(r".*/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?")


@dataclass(frozen=True)
class Origin:
    """Where a model or data set came from: a name on the hub, a URL, or something local known by its digest."""

    name: str = ""
    commit: str = ""
    digest: str = ""
    url: str = ""


@dataclass(frozen=True)
class CardFacts:
    """Of one student of a run. `files` are those that are given away, with their digests."""

    recipe: Recipe
    """Without paths: see `portable`."""
    teacher: Origin
    seed_set: Origin
    num_seed_rows: int | None
    address: str
    files: Mapping[str, FileEntry]
    training: Mapping[str, Any]
    """Summary of its training; empty for a merge."""
    generation: Mapping[str, Any]
    """Summary of the teacher's rewriting."""
    scores: Mapping[str, Scores]
    licence: Licence | None
    versions: Mapping[str, str]


def card_facts(
    recipe: Recipe,
    store: Store,
    manifests: Mapping[str, Manifest],
    student: str,
    *,
    files: Sequence[str],
    licence: Licence | None = None,
) -> CardFacts:
    """Read them from a run's artifacts. `files` names those of the student's that are given away."""
    made = student_manifest(manifests, student)
    assert made is not None, f"no student {student}"
    seed = manifests.get("seed")
    return CardFacts(
        recipe=portable(recipe),
        teacher=teacher_origin(recipe, manifests),
        seed_set=_seed_origin(manifests),
        num_seed_rows=seed.summary.get("num_rows") if seed else None,
        address=made.address,
        files={name: made.files[name] for name in files},
        training=made.summary if made.stage == "train" else {},
        generation=manifests["generate"].summary if "generate" in manifests else {},
        scores=read_scores(store, manifests),
        licence=licence,
        versions=made.versions,
    )


def teacher_origin(recipe: Recipe, manifests: Mapping[str, Manifest]) -> Origin:
    """By what it counted as when it was used. A snapshot in the hub's cache is known by the name in its path."""
    found = _identity(manifests, "teacher")
    cached = _CACHED.fullmatch(recipe.teacher.model)
    if "hub" in found:
        return Origin(name=found["hub"], commit=found.get("commit") or "")
    if cached is not None:
        return Origin(name=f"{cached[1]}/{cached[2]}", commit=cached[3])
    return Origin(digest=found.get("content", ""))


def _seed_origin(manifests: Mapping[str, Manifest]) -> Origin:
    found = _identity(manifests, "seed_set")
    if "name" in found:
        named = NAMED_SETS.get(found["name"])
        return Origin(name=named.hub if named else found["name"], commit=found.get("commit") or "")
    url = found.get("url", "")
    return Origin(url="" if url.startswith("file:") else without_secrets(url), digest=found.get("content", ""))


def _identity(manifests: Mapping[str, Manifest], source: str) -> dict[str, Any]:
    """What a source outside the store counted as, by the first artifact that was made of it."""
    for manifest in manifests.values():
        found = json.loads(manifest.identity).get("inputs", {}).get(source)
        if isinstance(found, dict):
            return found
    return {}


def portable(recipe: Recipe) -> Recipe:
    """The same recipe without a machine's paths and without credentials in URLs.

    Local files become relative to the folder that they share where they lie in it or one below; files strewn further
    tell of a machine, and become ROLE/NAME.
    """
    forgetting = recipe.forgetting
    places = {
        "teacher": recipe.teacher.model,
        "teacher_config": recipe.teacher.config,
        "seed_set": recipe.seed_set.source,
        "calibration": recipe.calibration.source,
        "forgetting": forgetting.source if forgetting else None,
        "embedding": forgetting.embedding if forgetting else None,
        "tasks": recipe.evaluate.include,
        "data": recipe.evaluate.data,
        "gates": recipe.gates,
    }
    local = {role: path for role, value in places.items() if value and (path := _local_path(value))}
    base = os.path.commonpath([str(path.parent) for path in local.values()]) if local else "/"
    short = {role: os.path.relpath(path, base) for role, path in local.items()}
    if len(PurePosixPath(base).parts) < 2 or any(name.count("/") > 1 for name in short.values()):
        short = {role: f"{role}/{path.name}" for role, path in local.items()}
    new: dict[str, Any] = {
        role: f"./{short[role]}" if role in short else value and without_secrets(value)
        for role, value in places.items()
    }
    held_out = {"source": new["forgetting"], "embedding": new["embedding"]}
    return recipe.model_copy(
        update={
            "forgetting": forgetting.model_copy(update=held_out) if forgetting else None,
            "teacher": recipe.teacher.model_copy(update={"model": new["teacher"], "config": new["teacher_config"]}),
            "seed_set": recipe.seed_set.model_copy(update={"source": new["seed_set"]}),
            "calibration": recipe.calibration.model_copy(update={"source": new["calibration"]}),
            "evaluate": recipe.evaluate.model_copy(update={"include": new["tasks"], "data": new["data"]}),
            "gates": new["gates"],
        }
    )


def _local_path(value: str) -> Path | None:
    path = value.removeprefix("file://").removeprefix("local://")
    return Path(path) if os.path.isabs(path) else None
