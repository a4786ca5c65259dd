"""Arguments and options that several commands share, and the values behind them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sdft_ray.errors import UserError

if TYPE_CHECKING:
    from sdft_ray.progress import ViewName
    from sdft_ray.recipe.recipe import Recipe
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.store.store import Store

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe YAML file.")]
RunArg = Annotated[str, typer.Argument(metavar="NAME", help="Name of a run; `sdft ls` lists them.")]
StoreOpt = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Artifact store: a path, s3://, gs://. Default: $SDFT_STORE, else `store` of the resources, else .sdft.",
    ),
]
ResourcesOpt = Annotated[
    Path | None,
    typer.Option("--resources", metavar="FILE", help="Resources YAML file. Default: all CPUs of this machine."),
]
DataOpt = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder that holds, as local files, what the recipe names on the hub. Default: $SDFT_DATA, else the hub.",
    ),
]
ViewOpt = Annotated[
    str,
    typer.Option("--progress", metavar="VIEW", help="auto, live, plain, json (one event per line) or none."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def store_url(given: str | None, resources: Resources | None = None) -> str:
    """The first that is set: `--store`, $SDFT_STORE, `store` of the resources, `.sdft`."""
    return given or os.environ.get("SDFT_STORE") or (resources.store if resources else None) or ".sdft"


def open_store(given: str | None, resources: Resources | None = None) -> Store:
    """The store at `store_url`."""
    from sdft_ray.store.store import Store

    return Store(store_url(given, resources))


def data_folder(given: Path | None) -> Path | None:
    """The first that is set: `--data`, $SDFT_DATA; None for the hub."""
    named = os.environ.get("SDFT_DATA")
    return given or (Path(named) if named else None)


def load_recipe(path: Path, data: Path | None = None) -> Recipe:
    """The recipe in a file, with what it names on the hub replaced by the files of `data_folder(data)`, if there is
    one. Raises `RecipeError`."""
    from sdft_ray.recipe.recipe import Recipe

    recipe, folder = Recipe.load(path), data_folder(data)
    if folder is None:
        return recipe
    from sdft_ray.pipeline.local_data import from_folder

    return from_folder(recipe, folder)


def check_extra(name: str, module: str) -> None:
    """Raise `UserError` if `module`, which the optional dependencies `name` bring, is not installed."""
    if find_spec(module) is None:
        raise UserError(f"this command needs {module}, which is not installed", f"pip install 'sdft_ray[{name}]'")


def load_resources(path: Path | None) -> Resources:
    """The file's, or the defaults without one. Raises `ResourceError`."""
    from sdft_ray.recipe.resources import Resources

    return Resources.load(path) if path else Resources()


def view_name(name: str) -> ViewName:
    """Raises `UserError` for an unknown view."""
    from sdft_ray.progress import VIEWS

    if name not in VIEWS:
        raise UserError(f"no progress view {name!r}", f"choose from {', '.join(VIEWS)}")
    return cast("ViewName", name)
