"""From what a user names to a directory that an engine can load, checked before it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft_ray.errors import ModelError, ServeError, StoreError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.size import size_of
from sdft_ray.models.source import resolve_source
from sdft_ray.pipeline.run import Run
from sdft_ray.serving.settings import ServedModel
from sdft_ray.store.store import Store

ROLES = ("teacher", "pruned", "patched")
_STAGE_ROLES = {"prune": "pruned", "patch": "patched", "correct": "teacher"}
"""What the models of a stage are; of all others, students."""


@dataclass(frozen=True)
class Located:
    """A model's files, and what the page tells about it."""

    directory: Path
    address: str
    """Its artifact in the store, "" for a plain directory."""
    facts: dict[str, Any] = field(default_factory=dict)


def named(sources: tuple[str, ...], store: Store) -> tuple[ServedModel, ...]:
    """Models under names of their own: `NAME` is a run's student, `NAME:teacher` one of its models, `NAME:all` all.

    Raises `ServeError` for a name that is none of run, address and directory, `StoreError` for a run without students.
    """
    found: dict[str, str] = {}
    for source in sources:
        run, _, role = source.partition(":")
        if run not in store.runs():
            locate(source, store)
            pairs = {_as_name(Path(source).resolve().name): source}
        elif role == "all":
            pairs = {name: f"{run}:{name}" for name in _open(store, run).roles}
        else:
            name = role or _open(store, run).best_student
            pairs = {name: f"{run}:{name}"}
        for name, place in pairs.items():
            own = name if name not in found else _as_name(place)
            if own in found:
                raise ServeError(f"{place} is named twice", "name each model once")
            found[own] = place
    return tuple(ServedModel(name=name, source=place) for name, place in found.items())


def _as_name(text: str) -> str:
    """What a model may be called."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("._+-")[:128] or "model"


def locate(source: str, store: Store) -> Located:
    """The files behind a name. Digests of an artifact are verified against its manifest, headers of any checkpoint.

    Raises `ServeError`, `StoreError` for damaged files, `ModelError` for what is no model.
    """
    if Path(source).is_dir():
        directory, address, facts = Path(source).resolve(), "", {}
    else:
        directory, address, facts = _in_store(source, store)
    if address:
        damaged = store.damaged_files(address)
        if damaged:
            told = f"{address} is damaged: {', '.join(damaged[:3])} differs from its digest"
            raise StoreError(told, "remove that folder and run the recipe again")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} is no model: it has no config.json", "give a Hugging Face directory")
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expected()
    size = size_of(checkpoint.config)
    sized = {"num_parameters": size.num_parameters, "num_blocks": size.num_blocks, "weight_bytes": size.weight_bytes}
    return Located(directory, address, {**sized, **facts})


def _in_store(source: str, store: Store) -> tuple[Path, str, dict[str, Any]]:
    run, _, role = source.partition(":")
    if run in store.runs():
        models = _open(store, run)
        return models.find(role or models.best_student)
    manifest = store.manifest(source) if source.count("/") == 1 else None
    if manifest is None:
        known = ", ".join(store.runs()) or "none"
        raise ServeError(
            f"{source!r} is no run, no artifact and no directory (runs in {store.url}: {known})",
            "give NAME, NAME:teacher, STAGE/ADDRESS or a directory",
        )
    return store.path(manifest.address), manifest.address, {"role": _STAGE_ROLES.get(manifest.stage, "student")}


def _open(store: Store, name: str) -> _Models:
    run = Run.open(store, name)
    if "report" not in run.manifests:
        raise StoreError(f"run {name} is not whole: its report is not in {store.url}", "run the recipe again")
    return _Models(run)


class _Models:
    """The models of a finished run. Its report is read once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        data = run.report_data()
        steps = {"pruned": "prune", "patched": "patch"}
        made = [role for role, step in steps.items() if step in run.manifests]
        self.roles = ["teacher", *made, *data.arm_names]
        self._recovery = {role: found.mean.value for role, found in data.recovery.items()}

    @property
    def best_student(self) -> str:
        """By mean recovery. Raises `StoreError` when there is none."""
        students = [role for role in self.roles if role not in ROLES]
        if not students:
            raise StoreError(f"run {self._run.name} has no student yet", "finish it with sdft compress")
        return max(students, key=lambda role: self._recovery.get(role) or 0.0)

    def find(self, role: str) -> tuple[Path, str, dict[str, Any]]:
        """Directory, address, and what is known. Raises `ServeError` for a model that the run does not have."""
        run = self._run
        if role not in self.roles:
            raise ServeError(f"run {run.name} has no model {role!r}", f"it has {', '.join(self.roles)}")
        facts = {"role": role if role in ROLES else "student", "recovery": self._recovery.get(role)}
        if role == "teacher":
            teacher = run.recipe.teacher
            return resolve_source(teacher.model, teacher.revision).fetch(), "", facts
        if role in ROLES:
            address = run.manifests["prune" if role == "pruned" else "patch"].address
            return run.store.path(address), address, facts
        directory = run.student_path(role)
        return directory, f"{directory.parent.name}/{directory.name}", facts
