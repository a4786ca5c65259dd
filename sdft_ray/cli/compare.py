"""`sdft compare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sdft_ray.errors import StoreError


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="RUN/MODEL, where MODEL is teacher, pruned, patched or a student; RUN alone is its best student, or "
            "all its models if nothing else is named. The first one is the baseline.",
        ),
    ],
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Artifact store. [env SDFT_STORE; default .sdft]")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page, with answers that changed.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Items at most for each pair and direction that the page shows.")
    ] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Set evaluated models side by side: scores, differences with intervals, items that went from right to wrong."""
    from rich.console import Console

    from sdft_ray.analysis.compare import compare as compare_models
    from sdft_ray.report.comparison.terminal import shown
    from sdft_ray.store.store import Store

    found = compare_models(Store(store or os.environ.get("SDFT_STORE") or ".sdft"), models, num_examples=examples)
    if html is not None:
        from sdft_ray.report.comparison.page import render

        try:
            html.write_text(render(found), encoding="utf-8")
        except OSError as reason:
            raise StoreError(f"cannot write {html}: {reason.strerror}", "name another file with --html") from None
    if as_json:
        typer.echo(found.to_json())
        return
    console = Console(highlight=False)
    console.print(shown(found))
    told = f"Page: {html}" if html else "A page with answers that changed: the same command with --html compare.html"
    console.print(f"\n{told}", soft_wrap=True, markup=False)
