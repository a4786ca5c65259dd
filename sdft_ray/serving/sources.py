"""Find the model directory behind a name, and check its files before an engine loads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft_ray.errors import ServeError, StoreError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.size import size_of
from sdft_ray.models.source import resolve_source
from sdft_ray.pipeline.run import Run
from sdft_ray.serving.settings import ServedModel
from sdft_ray.store.store import Store

ROLES = ("teacher", "pruned", "patched")
_STAGE_ROLES = {"prune": "pruned", "patch": "patched", "correct": "teacher"}
"""Role of the model that a stage writes; models of all other stages are students."""


@dataclass(frozen=True)
class LocatedModel:
    """A model's directory, and the facts about it that `/v1/models` lists."""

    directory: Path
    address: str
    """Address of its artifact in the store; "" for a plain directory."""
    facts: dict[str, Any] = field(default_factory=dict)


def named(sources: tuple[str, ...], store: Store) -> tuple[ServedModel, ...]:
    """Settings of the named models: `NAME` is a run's best student, `NAME:ROLE` another model of it, `NAME:all` all.

    Each gets a unique name. Raises `ServeError` for a name that is neither a run nor an address nor a directory, and
    `StoreError` for a run without students.
    """
    result: dict[str, str] = {}
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
        for name, location in pairs.items():
            unique = name if name not in result else _as_name(location)
            if unique in result:
                raise ServeError(f"{location} is given twice", "give each model once")
            result[unique] = location
    return tuple(ServedModel(name=name, source=location) for name, location in result.items())


def _as_name(text: str) -> str:
    """A valid model name that resembles the text."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("._+-")[:128] or "model"


def locate(source: str, store: Store) -> LocatedModel:
    """Find a model by name and check it: digests of an artifact's files, and the headers of the weights.

    Raises `ServeError` for an unknown name, `StoreError` for damaged files, `ModelError` for an invalid model.
    """
    if Path(source).is_dir():
        directory, address, facts = Path(source).resolve(), "", {}
    else:
        directory, address, facts = _in_store(source, store)
    if address:
        damaged = store.damaged_files(address)
        if damaged:
            message = f"{address} is damaged: {', '.join(damaged[:3])} does not match its digest"
            raise StoreError(message, "remove that folder and run the recipe again")
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expected()
    size = size_of(checkpoint.config)
    sizes = {"num_parameters": size.num_parameters, "num_blocks": size.num_blocks, "weight_bytes": size.weight_bytes}
    return LocatedModel(directory, address, {**sizes, **facts})


def _in_store(source: str, store: Store) -> tuple[Path, str, dict[str, Any]]:
    run, _, role = source.partition(":")
    if run in store.runs():
        models = _open(store, run)
        return models.find(role or models.best_student)
    manifest = store.manifest(source) if source.count("/") == 1 else None
    if manifest is None:
        known = ", ".join(store.runs()) or "none"
        raise ServeError(
            f"{source!r} is neither a run nor an artifact nor a directory (runs in {store.url}: {known})",
            "give NAME, NAME:teacher, STAGE/ADDRESS or a directory",
        )
    return store.path(manifest.address), manifest.address, {"role": _STAGE_ROLES.get(manifest.stage, "student")}


def _open(store: Store, name: str) -> _Models:
    run = Run.open(store, name)
    if "report" not in run.manifests:
        raise StoreError(f"run {name} is incomplete: its report is not in {store.url}", "run its recipe again")
    return _Models(run)


class _Models:
    """The models of a finished run, and their recovery from its report."""

    def __init__(self, run: Run) -> None:
        self._run = run
        data = run.report_data()
        steps = {"pruned": "prune", "patched": "patch"}
        optional = [role for role, step in steps.items() if step in run.manifests]
        self.roles = ["teacher", *optional, *data.arm_names]
        self._recovery = {role: recovery.mean.value for role, recovery in data.recovery.items()}

    @property
    def best_student(self) -> str:
        """The student with the highest mean recovery. Raises `StoreError` if there is none."""
        students = [role for role in self.roles if role not in ROLES]
        if not students:
            raise StoreError(f"run {self._run.name} has no student yet", "finish it with sdft compress")
        return max(students, key=lambda role: self._recovery.get(role) or 0.0)

    def find(self, role: str) -> tuple[Path, str, dict[str, Any]]:
        """Directory, address and facts of a model. Raises `ServeError` for a model that the run does not have."""
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
