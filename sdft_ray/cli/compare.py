"""`sdft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdft_ray.cli.options import JsonOpt, StoreOpt, open_store
from sdft_ray.errors import StoreError


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="RUN/MODEL, where MODEL is teacher, pruned, patched or a student. RUN alone: its best student; as the "
            "only argument, all its models. The first model is the baseline.",
        ),
    ],
    store: StoreOpt = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also write an HTML page, which shows changed answers."),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Changed answers on the page, at most, per pair of models and direction.")
    ] = 12,
    as_json: JsonOpt = False,
) -> None:
    """Compare evaluated models: scores, differences with confidence intervals, items that changed."""
    from rich.console import Console

    from sdft_ray.analysis.compare import compare as compare_models
    from sdft_ray.report.comparison.terminal import shown

    comparison = compare_models(open_store(store), models, num_examples=examples)
    if html is not None:
        from sdft_ray.report.comparison.page import render

        try:
            html.write_text(render(comparison), encoding="utf-8")
        except OSError as reason:
            raise StoreError(f"cannot write {html}: {reason.strerror}", "give another path with --html") from None
    if as_json:
        typer.echo(comparison.to_json())
        return
    console = Console(highlight=False)
    console.print(shown(comparison))
    page = f"Page: {html}" if html else "For a page that shows changed answers, add: --html compare.html"
    console.print(f"\n{page}", soft_wrap=True, markup=False)
