"""The command behind `jobs/digest.py`: parse, call three functions, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdft_ray.cli.options import DataOpt, StoreOpt, data_folder, open_store


def digest(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Study YAML files.")],
    into: Annotated[
        Path, typer.Option("--into", metavar="FILE", help="The digest, a .json file; its page lies beside.")
    ],
    store: StoreOpt = None,
    data: DataOpt = None,
) -> None:
    """Add what is finished of studies in a store to a digest, and write its page anew. Starts nothing."""
    from sdft_ray.analysis.digest import collect, empty, merged, read_digest, write_digest
    from sdft_ray.analysis.digest_page import digest_page
    from sdft_ray.recipe.study import Study

    at, folder = open_store(store), data_folder(data)
    known = read_digest(into)
    whole, found = known, empty()
    for file in studies:
        found, _ = merged(found, collect(Study.load(file), at, data=folder))
    whole, num_new = merged(known, found)
    write_digest(whole, into)
    page = into.with_suffix(".md")
    page.write_text(digest_page(whole, f"Results of {into.stem}"), encoding="utf-8")
    typer.echo(f"{num_new:,} new entries in {into}; page: {page}")
