"""`sdft`: parse, call one function, render. Heavy imports happen inside the commands, so `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sdft_ray.cli.compare import compare
from sdft_ray.cli.push import push
from sdft_ray.cli.serving import bench_serve, evaluate, keys, serve
from sdft_ray.cli.study import study
from sdft_ray.errors import StageError, UserError

if TYPE_CHECKING:
    from sdft_ray.progress import ViewName
    from sdft_ray.recipe.resources import Resources

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make large language models smaller without losing what they can do: prune, let the teacher rewrite the "
    "seed set, recover, evaluate. Runs on Ray, from a laptop to a cluster.",
)
INTERRUPTED = 130
lab = typer.Typer(no_args_is_help=True, help="The miniature laboratory: a tiny teacher and tasks that need no hub.")
app.add_typer(lab, name="lab")
app.add_typer(keys, name="keys")
app.command()(serve)
app.command()(evaluate)
app.command()(bench_serve)
app.command()(study)
app.command()(compare)
app.command()(push)

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe YAML file.")]
NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Name of a run; see `sdft ls`.")]
StoreOpt = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="Artifact store: a path, s3://, gs://. [env SDFT_STORE; default .sdft]"
    ),
]
ResourcesOpt = Annotated[
    Path | None,
    typer.Option("--resources", metavar="FILE", help="Resources YAML; without it: this machine's CPUs."),
]
ViewOpt = Annotated[
    str,
    typer.Option("--progress", metavar="VIEW", help="auto, live, plain, json (one event a line) or none."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


def _store_url(given: str | None, resources: Resources | None = None) -> str:
    return given or os.environ.get("SDFT_STORE") or (resources.store if resources else None) or ".sdft"


def _resources(path: Path | None) -> Resources:
    from sdft_ray.recipe.resources import Resources

    return Resources.load(path) if path else Resources()


@app.command()
def compress(
    recipe: RecipeArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. [default: the recipe's]")] = None,
    progress: ViewOpt = "auto",
) -> None:
    """Run a recipe from end to end. Finished steps are reused; Ctrl-C at any time, and run it again to continue."""
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.compress import compress as run_recipe
    from sdft_ray.recipe.recipe import Recipe

    profile = _resources(resources)
    run = run_recipe(Recipe.load(recipe), _store_url(store, profile), profile, name=name, view=_view(progress))
    if progress != "none":
        print_result(run)


def _view(name: str) -> ViewName:
    from sdft_ray.progress import VIEWS

    if name not in VIEWS:
        raise UserError(f"no progress view {name!r}", f"choose from {', '.join(VIEWS)}")
    return cast("ViewName", name)


@app.command()
def retry(
    name: NameArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    progress: ViewOpt = "auto",
) -> None:
    """Ask again for the rows of a run that failed, and make anew what depends on them; the rest is reused."""
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.compress import retry as retry_run
    from sdft_ray.pipeline.run import Run
    from sdft_ray.store.store import Store

    profile = _resources(resources)
    at = Store(_store_url(store, profile))
    failed = Run.open(at, name).manifests["generate"].summary["num_failed"]
    if not failed:
        typer.echo(f"no row of {name} failed; nothing to do")
        return
    run = retry_run(name, at, profile, view=_view(progress))
    left = run.manifests["generate"].summary["num_failed"]
    typer.echo(f"{failed - left} of {failed} failed rows are answered now")
    if progress != "none":
        print_result(run)


@app.command()
def explain(recipe: RecipeArg, store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """Show what would run and why, what is there already, and the sizes that will come out. Starts nothing."""
    from sdft_ray.cli.render import explanation_json, print_explanation
    from sdft_ray.pipeline.explain import explain as explain_recipe
    from sdft_ray.recipe.recipe import Recipe
    from sdft_ray.store.store import Store

    explanation = explain_recipe(Recipe.load(recipe), Store(_store_url(store)))
    if as_json:
        typer.echo(json.dumps(explanation_json(explanation)))
    else:
        print_explanation(explanation)


@app.command(name="ls")
def list_runs(store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """List the runs in a store."""
    from sdft_ray.cli.render import print_runs
    from sdft_ray.store.store import Store

    print_runs(Store(_store_url(store)), as_json=as_json)


@app.command()
def show(name: NameArg, store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """Show a run: scores, recovery, sizes, stages, and where its report lies."""
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.run import Run
    from sdft_ray.store.store import Store

    run = Run.open(Store(_store_url(store)), name)
    if as_json:
        typer.echo(json.dumps(run.to_json()))
    else:
        print_result(run, stages=True)


@app.command()
def why(
    name: NameArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    candidates: Annotated[int, typer.Option(min=1, help="Removals to show, the best by the recipe's metric.")] = 5,
    limit: Annotated[int, typer.Option(min=0, help="Items of every task to ask of each removal; 0 asks nothing.")] = 50,
    progress: ViewOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Why these blocks and channels: heat map, what was nearly chosen, and what each removal costs on each task."""
    from sdft_ray.analysis.why import why as find_why
    from sdft_ray.analysis.why import why_json
    from sdft_ray.cli.render import print_why
    from sdft_ray.pipeline.run import Run
    from sdft_ray.store.store import Store

    profile = _resources(resources)
    run = Run.open(Store(_store_url(store, profile)), name)
    found = find_why(
        run, profile, num_candidates=candidates, limit=limit or None, ask_tasks=limit > 0, view=_view(progress)
    )
    if as_json:
        typer.echo(why_json(found))
    else:
        print_why(found)


@app.command()
def verify(name: NameArg, store: StoreOpt = None) -> None:
    """Recompute the digests of all artifacts of a run. Exit code 1 when a file is damaged or missing."""
    from sdft_ray.cli.render import print_verification
    from sdft_ray.store.store import Store

    if not print_verification(Store(_store_url(store)), name):
        raise typer.Exit(1)


@app.command()
def submit(
    recipe: RecipeArg,
    address: Annotated[str, typer.Option(help="Ray dashboard, such as http://127.0.0.1:8265.")],
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. [default: the recipe's]")] = None,
    progress: ViewOpt = "auto",
    follow: Annotated[bool, typer.Option(help="Watch until it ends.")] = True,
) -> None:
    """Send a recipe to a Ray cluster as a job, and follow it. The store must be one that the cluster can reach."""
    from sdft_ray.pipeline.submit import submit as submit_recipe

    profile = _resources(resources)
    status = submit_recipe(
        recipe,
        address,
        resources=resources,
        store=_store_url(store, profile),
        name=name,
        view=_view(progress),
        follow=follow,
    )
    if status != 0:
        raise typer.Exit(status)


@lab.command(name="export")
def lab_export(
    directory: Annotated[Path, typer.Argument(help="Folder to write; made when missing.")],
    study: Annotated[bool, typer.Option("--study", help="Also study.yaml and its larger seed sets.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing.")] = False,
) -> None:
    """Write teacher, seed sets, tasks and quickstart recipe as ordinary files."""
    from sdft_ray.lab.export import export

    export(directory, study=study)
    if not quiet:
        typer.echo(f"wrote {directory}; next: sdft compress {directory / 'quickstart.yaml'}")


@lab.command(name="train-teacher")
def lab_train_teacher(
    directory: Annotated[Path, typer.Argument(help="Folder for the trained teacher.")],
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Train a laboratory teacher from scratch (about half an hour on two cores) and check its gates."""
    from sdft_ray.cli.render import train_teacher

    if not train_teacher(directory, num_threads):
        raise typer.Exit(1)


@lab.command(name="gates")
def lab_gates(
    teacher: Annotated[Path | None, typer.Argument(help="Teacher directory. [default: the shipped one]")] = None,
    seed_set: Annotated[
        str, typer.Option(metavar="NAME", help="mixed, word_problems, mixed_large or word_problems_large.")
    ] = "mixed",
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of plain fine-tuning. [default: the quickstart's]")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Check the four gates that make a comparison of recovery methods fair."""
    from sdft_ray.cli.render import print_gates

    if not print_gates(teacher, seed_set, learning_rate, as_json=as_json):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: user errors are one line and exit code 2, failed stages exit code 1, Ctrl-C 130."""
    try:
        app()
    except UserError as error:
        _complain(str(error), 2)
    except StageError as error:
        _complain(f"{error} → finished work is kept; run the same command again to continue", 1)
    except SystemExit as leaving:
        if leaving.code != INTERRUPTED:  # typer makes it of Ctrl-C
            raise
        _say("interrupted → finished work is kept; run the same command again to continue")
        os._exit(INTERRUPTED)  # threads may still wait for workers that are gone; a normal exit would wait with them


def _complain(message: str, code: int) -> None:
    _say(message)
    sys.exit(code)


def _say(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"sdft: {message}\n")
    sys.stderr.flush()
