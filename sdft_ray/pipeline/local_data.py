"""A folder in place of the hub: teacher, sets of rows and data of tasks that a recipe names there, as local files.

The folder has one folder for each of them, named as on the hub, with or without the owner (`databricks-dolly-15k`,
`dolly-15k`, `dolly15k`); a named set may also have the name that recipes call it by. Of a data set it holds one file
for each split (see `sdft_ray.evaluation.task_data`). What lies there counts by its content, so results are those of the
files and never taken for those of the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from sdft_ray.data.hub import NAMED_SETS
from sdft_ray.errors import RecipeError
from sdft_ray.evaluation.task_data import folders_below, split_files
from sdft_ray.recipe.inputs import RowSource, Teacher
from sdft_ray.recipe.recipe import Recipe

_Part = TypeVar("_Part", bound=RowSource)


def from_folder(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe with its hub names replaced; unchanged for None. Paths and URLs of the recipe stay.

    `evaluate.data` becomes the folder, unless the recipe has task files of its own or names another one. Raises
    `RecipeError` for what the folder does not hold: nothing is then taken from the hub in its place.
    """
    if folder is None:
        return recipe
    if not folder.is_dir():
        raise RecipeError(f"the data folder {folder} does not exist", "check --data or SDFT_DATA")
    folder = folder.resolve()
    changed = {
        "teacher": _teacher(recipe.teacher, folder),
        "seed_set": _rows(recipe.seed_set, folder),
        "calibration": _rows(recipe.calibration, folder),
    }
    if recipe.forgetting is not None:
        changed["forgetting"] = _rows(recipe.forgetting, folder)
    if recipe.evaluate.data is None and recipe.evaluate.include is None:
        changed["evaluate"] = recipe.evaluate.model_copy(update={"data": str(folder)})
    return recipe.model_copy(update=changed)


def _teacher(teacher: Teacher, folder: Path) -> Teacher:
    if Path(teacher.model).is_dir() or "://" in teacher.model or teacher.model.count("/") != 1:
        return teacher
    for name in (teacher.model, teacher.model.rpartition("/")[2]):
        for place in folders_below(folder, name):
            if (place / "config.json").is_file():
                return teacher.model_copy(update={"model": str(place), "revision": None, "config": None})
    short = teacher.model.rpartition("/")[2]
    raise RecipeError(
        f"the data folder {folder} does not hold the teacher {teacher.model}",
        f"put its files there as {short}/; `sdft import SOURCE DIR` writes such a folder from a GGUF file",
    )


def _rows(part: _Part, folder: Path) -> _Part:
    name = part.source
    if name not in NAMED_SETS:
        return part
    known = NAMED_SETS[name]
    owner, _, short = known.hub.rpartition("/")
    bare = short.removeprefix(f"{owner}-")
    for option in (known.hub, short, bare, bare.replace("-", ""), name):
        for place in folders_below(folder, option):
            files = split_files(place).get(known.split, ())
            if len(files) > 1:
                raise RecipeError(
                    f"{place} holds the split {known.split} of {name} in {len(files)} files", "make one file of them"
                )
            if files:
                return part.model_copy(update={"source": str(files[0]), "revision": None})
    raise RecipeError(
        f"the data folder {folder} does not hold {name} ({known.hub})",
        f"put its rows there: {name}/{known.split}.jsonl or .parquet",
    )
