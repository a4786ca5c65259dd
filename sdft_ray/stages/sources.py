"""What a recipe takes from outside the store, and what it counts as: content digests and commits, never paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_ray.data.hub import NAMED_SETS, hub_commit
from sdft_ray.errors import RecipeError
from sdft_ray.models.source import ModelSource, resolve_source
from sdft_ray.recipe.recipe import Forgetting, Recipe
from sdft_ray.store.store import Store


def embedding_source(asked: Forgetting) -> ModelSource:
    """Where the embedding model comes from, which is asked for. Raises `ModelError`."""
    assert asked.embedding is not None
    return resolve_source(asked.embedding, asked.embedding_revision, "forgetting.embedding_revision")


class Sources:
    """Identities of what lies outside the store: teacher, embedding model, sets of rows, task files."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self._recipe = recipe
        self._store = store
        self._known: dict[str, Any] = {}

    def __call__(self, name: str) -> dict[str, Any]:
        """Digest of the content, or name and commit. Raises `UserError` when nothing is there."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> dict[str, Any]:
        recipe = self._recipe
        if name == "teacher":
            source = resolve_source(recipe.teacher.model, recipe.teacher.revision)
            flags = recipe.teacher.model_dump(include={"dtype", "trust_remote_code"}, exclude_defaults=True)
            if recipe.teacher.config is not None:
                flags["expected_config"] = self.place("teacher.config", recipe.teacher.config)
            return {**self._model(source), **flags}
        if name == "embedding":
            assert recipe.forgetting is not None
            return self._model(embedding_source(recipe.forgetting))
        if name == "tasks":
            return self.place(name, str(recipe.evaluate.include))
        if name == "gates":
            return self.place(name, str(recipe.gates))
        part = {"seed_set": recipe.seed_set, "calibration": recipe.calibration, "forgetting": recipe.forgetting}[name]
        assert part is not None
        return self.place(name, part.source, part.revision)

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
