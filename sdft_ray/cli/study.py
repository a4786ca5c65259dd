"""`sdft study`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sdft_ray.cli.options import (
    DataOpt,
    JsonOpt,
    ResourcesOpt,
    StoreOpt,
    ViewOpt,
    data_folder,
    load_resources,
    open_store,
    view_name,
)  # fmt: skip


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study YAML file.")],
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    data: DataOpt = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="NAME", help="Only this variant; may be given several times. Default: all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the number of recipes and trainings, and start nothing.")
    ] = False,
    progress: ViewOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Vary a recipe over data-set size, number of blocks, arm, metric, seed and learning rate; plot the curve.

    The recipes share artifacts and run in parallel. Interrupt with Ctrl-C at any time; the same command continues.
    What Ray and the engines print is written to logs/NAME.log in the store.
    """
    from sdft_ray.cli.render_study import print_plan, print_study
    from sdft_ray.pipeline.study import plan_study, run_study
    from sdft_ray.recipe.study import Study

    definition, profile, view = Study.load(file).only(variant or ()), load_resources(resources), view_name(progress)
    at, folder = open_store(store, profile), data_folder(data)
    plan = plan_study(definition, at, data=folder)
    if not as_json:
        print_plan(definition, plan)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(plan.to_json()))
        return
    print_study(run_study(definition, at, profile, data=folder, view=view), at, as_json=as_json)
