"""One step of a recipe, and the steps that it needs, as the entry point of a cluster job.

    python jobs/stage.py RECIPE generate --resources gpu8.yaml --store s3://bucket/sdft --progress json

So one job can generate the data set on some nodes, and another job can train on other nodes: both use the same recipe
and store, and neither repeats the finished steps of the other. Exit codes as in `jobs/compress.py`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sdft_ray.cli.app import run_command
from sdft_ray.cli.options import (
    JsonOpt,
    RecipeArg,
    ResourcesOpt,
    StoreOpt,
    ViewOpt,
    load_resources,
    open_store,
    view_name,
)  # fmt: skip

StepArg = Annotated[
    str,
    typer.Argument(
        metavar="STEP",
        help="A step that `sdft explain RECIPE` lists, such as generate or train:sdft; or a stage, such as train, for "
        "all of its steps.",
    ),
]


def stage(
    recipe: RecipeArg,
    step: StepArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    progress: ViewOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Run one step of a recipe and the steps that it needs, and print where their artifacts are in the store.

    Steps that are in the store already are reused. After an interruption, run the same command again to continue.
    """
    from sdft_ray.pipeline.step import run_step
    from sdft_ray.recipe.recipe import Recipe

    profile = load_resources(resources)
    at = open_store(store, profile)
    states = run_step(Recipe.load(recipe), step, at, profile, view=view_name(progress))
    addresses = {name: state.address for name, state in states.items()}
    if as_json:
        typer.echo(json.dumps({"store": at.url, "steps": addresses}))
        return
    for name, address in addresses.items():
        typer.echo(f"{name:<20} {address}")


if __name__ == "__main__":
    run_command(stage)
