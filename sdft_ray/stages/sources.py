"""What a recipe takes from outside the store, and what it counts as: content digests and commits, never paths."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from sdft_ray.data.hub import NAMED_SETS, hub_commit
from sdft_ray.errors import RecipeError
from sdft_ray.evaluation.task_inputs import task_inputs
from sdft_ray.evaluation.task_plans import TaskPlaces
from sdft_ray.models.source import ModelSource, resolve_source
from sdft_ray.recipe.inputs import Forgetting
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import canonical
from sdft_ray.stages.graph import Step
from sdft_ray.stages.job import Places
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.store import Store

_ROW_SOURCES = ("seed_set", "calibration", "forgetting")
"""Parts of a recipe that name rows."""


def embedding_source(asked: Forgetting) -> ModelSource:
    """Where the embedding model of a recipe that has one comes from. Raises `ModelError`."""
    assert asked.embedding is not None
    return resolve_source(asked.embedding, asked.embedding_revision, "forgetting.embedding_revision")


def task_places(recipe: Recipe) -> TaskPlaces:
    """Where the tasks of a recipe and their data lie, for work that may run elsewhere."""
    include, data = (
        None if place is None else Path(place) for place in (recipe.evaluate.include, recipe.evaluate.data)
    )
    return TaskPlaces(include, data, Path.cwd())


class Sources:
    """Identities of what lies outside the store: teacher, embedding model, sets of rows, task files."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self._recipe = recipe
        self._store = store
        self._known: dict[str, Any] = {}

    @cached_property
    def teacher(self) -> TeacherModel:
        """Resolved once for the run. Raises `ModelError`."""
        return TeacherModel.of(self._recipe.teacher, self._recipe.chat)

    def places(self, step: Step) -> Places:
        """Where the sources of a step lie, and of no other."""
        recipe, rows = self._recipe, None
        for name in step.sources:
            if name in _ROW_SOURCES:
                part = getattr(recipe, name)
                rows = (part.source, part.revision)
        return Places(
            rows=rows,
            tasks=task_places(recipe) if "tasks" in step.sources else TaskPlaces(),
            embedding=self.embedding if "embedding" in step.sources else None,
        )

    @cached_property
    def embedding(self) -> ModelSource:
        """The embedding model, of a recipe that has one. Raises `ModelError`."""
        assert self._recipe.forgetting is not None
        return embedding_source(self._recipe.forgetting)

    def __call__(self, name: str) -> dict[str, Any]:
        """Digest of the content, or name and commit. Raises `UserError` when nothing is there."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> dict[str, Any]:
        recipe = self._recipe
        if name == "teacher":
            flags = recipe.teacher.model_dump(include={"dtype"}, exclude_defaults=True)
            if recipe.teacher.config is not None:
                flags["expected_config"] = self.place("teacher.config", recipe.teacher.config)
            if chat := canonical(recipe.chat):
                flags["chat"] = chat
            return {**self._model(self.teacher.source), **flags}
        if name == "embedding":
            return self._model(self.embedding)
        if name == "tasks":
            return self._tasks()
        if name == "gates":
            return self.place(name, str(recipe.gates))
        assert name in _ROW_SOURCES, name
        part = getattr(recipe, name)
        return self.place(name, part.source, part.revision)

    def _tasks(self) -> dict[str, Any]:
        """The whole folder of task files, files that tasks read elsewhere in the order in which they are named, and
        files of the folder of data sets by their place in it."""
        evaluate, places = self._recipe.evaluate, task_places(self._recipe)
        read = task_inputs(evaluate.shots, places)
        identity = self.place("evaluate.include", evaluate.include) if evaluate.include is not None else {}
        if read.outside:
            identity["outside"] = [{path.name: self._store.outside_digest(path)} for path in read.outside]
        if places.data is not None:
            data = {path.relative_to(places.data).as_posix(): self._store.outside_digest(path) for path in read.data}
            identity["data"] = data
        return identity

    def _model(self, source: ModelSource) -> dict[str, Any]:
        if source.directory is not None:
            return {"content": self._store.outside_digest(Path(source.directory))}
        return {"hub": source.hub, "commit": source.commit}

    def place(self, name: str, value: str, revision: str | None = None) -> dict[str, Any]:
        """The digest of a file or folder; a URL stands for itself, a named data set for its commit."""
        if "://" in value:
            return {"url": value}
        path = Path(value)
        if path.exists():
            return {"content": self._store.outside_digest(path)}
        if path.is_absolute() or path.suffix:
            raise RecipeError(f"{name}: no file {value}", "check the path; it starts at the recipe's folder")
        if value not in NAMED_SETS:
            raise RecipeError(f"{name}: no file or data set {value!r}", f"named sets: {', '.join(NAMED_SETS)}")
        return {"name": value, "commit": revision or hub_commit(value)}
