"""`sdft study`: parse, call one function, render."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from sdft_ray.progress import ViewName


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study YAML file.")],
    resources: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Resources YAML; without it: this machine's CPUs.")
    ] = None,
    store: Annotated[str | None, typer.Option(metavar="URL", help="[env SDFT_STORE; default .sdft]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show how much it asks for, and start nothing.")] = False,
    progress: Annotated[
        str, typer.Option(metavar="VIEW", help="auto, live, plain, json (one event a line) or none.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Vary a recipe over data-set size, blocks, arm, metric, seed and learning rate; draw the curve.

    Recipes share artifacts and run side by side. Ctrl-C at any time, and run it again to continue.
    """
    from sdft_ray.cli.render_study import print_plan, print_study
    from sdft_ray.pipeline.study import plan_study, run_study
    from sdft_ray.progress import VIEWS
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.recipe.study import Study
    from sdft_ray.store.store import Store

    if progress not in VIEWS:
        raise typer.BadParameter(f"choose from {', '.join(VIEWS)}", param_hint="--progress")
    asked, profile = Study.load(file), Resources.load(resources) if resources else Resources()
    at = Store(store or os.environ.get("SDFT_STORE") or profile.store or ".sdft")
    plan = plan_study(asked, at)
    if not as_json:
        print_plan(asked, plan)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(plan.to_json()))
        return
    print_study(run_study(asked, at, profile, view=cast("ViewName", progress)), at, as_json=as_json)
