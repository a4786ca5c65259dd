"""The command `sdft`: each command parses, calls one function and prints. They import late, so `--help` is fast."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sdft_ray.cli.compare import compare
from sdft_ray.cli.import_model import import_model
from sdft_ray.cli.options import (
    DataOpt,
    JsonOpt,
    RecipeArg,
    ResourcesOpt,
    RunArg,
    StoreOpt,
    ViewOpt,
    load_recipe,
    load_resources,
    open_store,
    store_url,
    view_name,
)  # fmt: skip
from sdft_ray.cli.push import push
from sdft_ray.cli.serving import bench_serve, evaluate, keys, serve
from sdft_ray.cli.study import study
from sdft_ray.errors import StageError, UserError
from sdft_ray.pipeline.interrupt import interrupts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress large language models and recover their quality: prune the model, let the original model rewrite "
    "the training data, fine-tune on it, evaluate, serve. Runs on Ray, on a laptop or a cluster.",
)
INTERRUPTED = 130
CONTINUE = "finished work is kept; run the same command again to continue"
lab = typer.Typer(no_args_is_help=True, help="A tiny teacher and tasks that need no download.")

RunNameOpt = Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run. Default: the recipe's name.")]


def compress(
    recipe: RecipeArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    name: RunNameOpt = None,
    data: DataOpt = None,
    progress: ViewOpt = "auto",
) -> None:
    """Run a recipe from end to end.

    Steps that are in the store already are reused. Interrupt with Ctrl-C at any time; the same command continues.
    What Ray and the engines print is written to logs/NAME.log in the store.
    """
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.compress import compress as run_recipe

    profile = load_resources(resources)
    run = run_recipe(load_recipe(recipe, data), store_url(store, profile), profile, name=name, view=view_name(progress))
    if progress != "none":
        print_result(run)


def retry(
    name: RunArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    progress: ViewOpt = "auto",
) -> None:
    """Generate the failed rows of a run again, and run the steps that depend on them; the rest is reused."""
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.compress import retry as retry_run
    from sdft_ray.pipeline.run import Run

    profile = load_resources(resources)
    at = open_store(store, profile)
    failed = Run.open(at, name).manifests["generate"].summary["num_failed"]
    if not failed:
        typer.echo(f"no rows of {name} failed; there is nothing to do")
        return
    run = retry_run(name, at, profile, view=view_name(progress))
    left = run.manifests["generate"].summary["num_failed"]
    typer.echo(f"{failed - left} of {failed} failed rows have an answer now")
    if progress != "none":
        print_result(run)


def explain(
    recipe: RecipeArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    data: DataOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show which steps would run and why, which are in the store, the memory they need, and the resulting model sizes.

    Starts nothing.
    """
    from sdft_ray.cli.render import explanation_json, print_explanation
    from sdft_ray.pipeline.explain import explain as explain_recipe

    profile = load_resources(resources)
    explanation = explain_recipe(load_recipe(recipe, data), open_store(store, profile), profile)
    if as_json:
        typer.echo(json.dumps(explanation_json(explanation)))
    else:
        print_explanation(explanation)


def try_recipe(
    recipe: RecipeArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    data: DataOpt = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the seed set to rewrite, drawn over all of it.")] = 32,
    progress: ViewOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Rehearse a recipe: rewrite a few rows by every template, and tell how long the run takes.

    Shows how many rewrites each template has kept, why not the others, examples, and how far they are from the teacher.
    Nothing is committed to the store; a run reuses the rewrites of its template.
    """
    from sdft_ray.cli.render_try import print_rehearsal, rehearsal_text
    from sdft_ray.pipeline.rehearsal import rehearse

    profile = load_resources(resources)
    at = open_store(store, profile)
    found = rehearse(load_recipe(recipe, data), at, profile, num_rows=rows, view=view_name(progress))
    if as_json:
        typer.echo(rehearsal_text(found))
    else:
        print_rehearsal(found)


def list_runs(store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """List the runs in a store."""
    from sdft_ray.cli.render import print_runs

    print_runs(open_store(store), as_json=as_json)


def show(name: RunArg, store: StoreOpt = None, as_json: JsonOpt = False) -> None:
    """Show a run: scores, recovery, model sizes, steps, and the path of its report."""
    from sdft_ray.cli.render import print_result
    from sdft_ray.pipeline.run import Run

    run = Run.open(open_store(store), name)
    if as_json:
        typer.echo(json.dumps(run.to_json()))
    else:
        print_result(run, stages=True)


def why(
    name: RunArg,
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Number of removals to show, best first by the recipe's metric.")
    ] = 5,
    limit: Annotated[
        int, typer.Option(min=0, help="Items per task for the evaluation of each removal; 0: no evaluation.")
    ] = 50,
    progress: ViewOpt = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Explain the choice of blocks and channels: heat map, next-best removals, and the cost of each on every task."""
    from sdft_ray.analysis.why import why as find_why
    from sdft_ray.analysis.why import why_json
    from sdft_ray.cli.render import print_why
    from sdft_ray.pipeline.run import Run

    profile = load_resources(resources)
    run = Run.open(open_store(store, profile), name)
    explanation = find_why(
        run, profile, num_candidates=candidates, limit=limit or None, ask_tasks=limit > 0, view=view_name(progress)
    )
    if as_json:
        typer.echo(why_json(explanation))
    else:
        print_why(explanation)


def verify(name: RunArg, store: StoreOpt = None) -> None:
    """Compare all files of a run with their SHA-256 digests. Exit code 1 if a file is damaged or missing."""
    from sdft_ray.cli.render import print_verification

    if not print_verification(open_store(store), name):
        raise typer.Exit(1)


def submit(
    recipe: RecipeArg,
    address: Annotated[
        str, typer.Option(metavar="URL", help="Address of the Ray dashboard, such as http://127.0.0.1:8265.")
    ],
    resources: ResourcesOpt = None,
    store: StoreOpt = None,
    name: RunNameOpt = None,
    data: DataOpt = None,
    progress: ViewOpt = "auto",
    follow: Annotated[bool, typer.Option(help="Show the job's progress until it ends.")] = True,
) -> None:
    """Submit a recipe to a Ray cluster as a Ray job, and show its progress. All nodes must reach the store.

    Small files that the recipe names travel with the job; of large ones the path must be the same on all nodes.
    """
    from sdft_ray.pipeline.submit import submit as submit_recipe

    profile = load_resources(resources)
    status = submit_recipe(
        load_recipe(recipe, data),
        address,
        resources=resources,
        store=store_url(store, profile),
        name=name,
        view=view_name(progress),
        follow=follow,
    )
    if status != 0:
        raise typer.Exit(status)


@lab.command(name="export")
def lab_export(
    directory: Annotated[Path, typer.Argument(help="Folder to write; created if missing.")],
    study: Annotated[bool, typer.Option("--study", help="Also write study.yaml and its larger seed sets.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
) -> None:
    """Write the tiny teacher, its seed sets, tasks and the quickstart recipe as ordinary files."""
    from sdft_ray.lab.export import export

    export(directory, study=study)
    if not quiet:
        typer.echo(f"wrote {directory}; next: sdft compress {directory / 'quickstart.yaml'}")


@lab.command(name="train-teacher")
def lab_train_teacher(
    directory: Annotated[Path, typer.Argument(help="Folder to write the trained teacher to.")],
    num_threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Train a tiny teacher from scratch (about half an hour on two cores) and check its gates."""
    from sdft_ray.cli.render import train_teacher

    if not train_teacher(directory, num_threads):
        raise typer.Exit(1)


@lab.command(name="gates")
def lab_gates(
    teacher: Annotated[Path | None, typer.Argument(help="Teacher directory. Default: the built-in teacher.")] = None,
    seed_set: Annotated[
        str, typer.Option(metavar="NAME", help="One of mixed, word_problems, mixed_large, word_problems_large.")
    ] = "mixed",
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Learning rate of fine-tuning. Default: the quickstart's.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Check the four conditions (gates) under which a comparison of recovery methods on this teacher is fair."""
    from sdft_ray.cli.render import print_gates

    if not print_gates(teacher, seed_set, learning_rate, as_json=as_json):
        raise typer.Exit(1)


_NAMES = {list_runs: "ls", import_model: "import", try_recipe: "try"}
# The order of `sdft --help`.
for _panel, _commands in {
    "Prepare a model": (import_model,),
    "Run a recipe": (explain, try_recipe, compress, submit, study, retry),
    "Look at results": (list_runs, show, why, compare, verify),
    "Use the models": (serve, evaluate, bench_serve, push),
}.items():
    for _command in _commands:
        app.command(name=_NAMES.get(_command), rich_help_panel=_panel)(_command)
app.add_typer(keys, name="keys", rich_help_panel="Use the models")
app.add_typer(lab, name="lab", rich_help_panel="Built-in example")


def main() -> None:
    """Entry point of `sdft`."""
    run_command(app)


def run_command(command: typer.Typer | Callable[..., None]) -> None:
    """Run an application or a single command on `sys.argv`.

    A `UserError` is printed as one line, exit code 2; a failed stage likewise, exit code 1; Ctrl-C and SIGTERM exit
    with 130.
    """
    try:
        with interrupts():
            command() if isinstance(command, typer.Typer) else _single(command)()
    except UserError as error:
        _exit(str(error), 2)
    except StageError as error:
        _exit(f"{error} → {error.hint}; {CONTINUE}" if error.hint else f"{error} → {CONTINUE}", 1)
    except SystemExit as leaving:
        if leaving.code != INTERRUPTED:  # typer turns Ctrl-C into it
            raise
        _print_error(f"interrupted → {CONTINUE}")
        os._exit(INTERRUPTED)  # a normal exit would wait for threads, which may wait for workers that are gone


def _single(command: Callable[..., None]) -> typer.Typer:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(command)
    return single


def _exit(message: str, code: int) -> None:
    _print_error(message)
    sys.exit(code)


def _print_error(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"sdft: {message}\n")
    sys.stderr.flush()
