"""The job of one step, as the scheduler makes it, for steps that run on their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import steps
from sdft_ray.stages.job import Progress, StageContext
from sdft_ray.stages.sources import Sources
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.store import Store


def silent(done: int, total: int, unit: str) -> None:
    """Nobody watches."""


def make_job(
    step: str,
    address: str,
    store_url: str,
    recipe: Recipe,
    resources: Resources,
    teacher: ModelSource,
    inputs: dict[str, str],
    progress: Progress = silent,
    **more: Any,
) -> StageContext:
    """The step called `step` of a recipe, with inputs of the caller's choice."""
    found = {each.name: each for each in steps(recipe)}[step]
    return StageContext(
        step=found,
        address=address,
        store_url=store_url,
        recipe_name=recipe.name,
        resources=resources,
        teacher=teacher_of(recipe, teacher),
        inputs=inputs,
        progress=progress,
        places=Sources(recipe, Store(store_url)).places(found),
        **more,
    )


def teacher_of(recipe: Recipe, source: ModelSource) -> TeacherModel:
    """The recipe's teacher, whose files lie at `source`."""
    return TeacherModel(recipe.teacher.model, source, recipe.teacher.dtype)


def moved(job: StageContext, source: ModelSource) -> StageContext:
    """The same job with another teacher."""
    return replace(job, teacher=replace(job.teacher, source=source))
