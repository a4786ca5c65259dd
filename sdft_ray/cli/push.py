"""`sdft push`: release a student with its model card."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sdft_ray.release.piece import Watch
    from sdft_ray.release.push import Pushed

_LARGE_BYTES = 64 * 2**20
"""Releases below it are through before a bar could be read."""


def push(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a run; see `sdft ls`.")],
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="An arm or a merge of it; see `sdft show NAME`.")],
    destination: Annotated[
        str,
        typer.Argument(metavar="DESTINATION", help="hf://OWNER/NAME, a folder, or s3://, gs:// and the like."),
    ],
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Artifact store. [env SDFT_STORE; default .sdft]")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the hub's repository public; it is private without.")
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Even if it missed its recipe's release bounds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be sent.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Release a student: weights, tokenizer, recipe and model card, to the hub, a bucket or a folder.

    A destination that holds something else is never overwritten. A push that was cut off is run again.
    """
    from rich.console import Console

    from sdft_ray.pipeline.run import Run
    from sdft_ray.release.push import prepare
    from sdft_ray.store.store import Store

    run = Run.open(Store(store or os.environ.get("SDFT_STORE") or ".sdft"), name)
    ready = prepare(run, student, destination, private=not public, anyway=anyway)
    if not as_json:
        _print_plan(Console(highlight=False), ready.pushed, dry_run)
    with _progress(ready.pushed.num_bytes, quiet=as_json) as watch:
        done = ready.pushed if dry_run else ready.send(watch)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "dry_run": dry_run}))
    elif not dry_run:
        typer.echo(done.url)


def _print_plan(console: Console, planned: Pushed, dry_run: bool) -> None:
    """What is to be sent, and what is there."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("file", "bytes", "", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for file in planned.files:
        table.add_row(escape(file.name), f"{file.num_bytes:,}", "" if file.sent else "[dim]there already[/]")
    console.print(table)
    num = sum(file.sent for file in planned.files)
    verb = "would go" if dry_run else "go"
    told = f"{num} of {len(planned.files)} files, {planned.num_bytes:,} bytes, {verb} to {planned.url}"
    if not num:
        told = f"all {len(planned.files)} files are there already; nothing to send to {planned.url}"
    console.print(told, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Watch]:
    """A bar on a terminal for what takes a while. The hub's library draws its own, on a terminal alone as well."""
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
