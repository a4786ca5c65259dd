"""`sdft push`: release a student with its model card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sdft_ray.cli.options import JsonOpt, RunArg, StoreOpt, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from sdft_ray.release.files import Watch
    from sdft_ray.release.push import Release

_LARGE_BYTES = 64 * 2**20
"""A smaller release is sent so fast that nobody could read a progress bar."""


def push(
    name: RunArg,
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="An arm or a merge of the run; `sdft show NAME` lists them.")
    ],
    destination: Annotated[
        str,
        typer.Argument(metavar="DESTINATION", help="hf://OWNER/NAME, a folder, or a URL such as s3://BUCKET/FOLDER."),
    ],
    store: StoreOpt = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Create a public repository on the Hugging Face Hub; the default is private."),
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Release it even if it is outside the recipe's release bounds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the files, but upload nothing.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Release a student: upload weights, tokenizer, recipe and model card to the Hub, a bucket or a folder.

    Other files at the destination are never overwritten. After an interruption, run the same command again.
    """
    from rich.console import Console

    from sdft_ray.pipeline.run import Run
    from sdft_ray.release.push import prepare

    run = Run.open(open_store(store), name)
    ready = prepare(run, student, destination, private=not public, anyway=anyway)
    if not as_json:
        _print_plan(Console(highlight=False), ready.pushed, dry_run)
    with _progress(ready.pushed.num_bytes, quiet=as_json) as watch:
        done = ready.pushed if dry_run else ready.send(watch)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
    elif not dry_run:
        typer.echo(done.url)


def _print_plan(console: Console, planned: Release, dry_run: bool) -> None:
    """The files, and which of them are at the destination already."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("file", "bytes", "", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for file in planned.files:
        table.add_row(escape(file.name), f"{file.num_bytes:,}", "" if file.sent else "[dim]already there[/]")
    console.print(table)
    num = sum(file.sent for file in planned.files)
    sending = "would be sent" if dry_run else "are sent"
    summary = f"{num} of {len(planned.files)} files, {planned.num_bytes:,} bytes, {sending} to {planned.url}"
    if not num:
        summary = f"all {len(planned.files)} files are at {planned.url} already; there is nothing to send"
    console.print(summary, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Watch]:
    """A progress bar for large releases, on a terminal only. The hub's library draws its own, also there only."""
    from huggingface_hub.utils import disable_progress_bars
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        disable_progress_bars()
    if quiet or not console.is_terminal or total < _LARGE_BYTES:
        yield lambda name, num_bytes: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    sent: dict[str, int] = {}
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def watch(name: str, num_bytes: int) -> None:
            sent[name] = num_bytes
            bar.update(task, description=name, completed=sum(sent.values()))

        yield watch
