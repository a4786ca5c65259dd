"""`sdft import`: turn a GGUF file, PyTorch pickles or a LoRA adapter into a model folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdft_ray.cli.options import JsonOpt


def import_model(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A GGUF file or a folder with one; a folder with pytorch_model.bin; or a folder with a LoRA adapter.",
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write; it must be new or empty.")],
    base: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Base model of a LoRA adapter. Default: SOURCE itself.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="dtype of the weights; auto keeps the source's, and dequantized weights become float32."),
    ] = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Write a model as safetensors with tokenizer, chat template, generation config and model card.

    Pickles are read without running anything in them. What was lost, such as precision by quantization, is printed and
    stands in the model card.
    """
    from sdft_ray.importing.importer import import_model as run_import

    done = run_import(source, directory, base=base, dtype=dtype, tell=lambda line: typer.echo(f"{line} ...", err=True))
    if as_json:
        typer.echo(json.dumps({**asdict(done), "directory": str(done.directory)}))
        return
    typer.echo(
        f"{done.directory}: {done.model_type}, {done.num_parameters:,} parameters in {done.dtype}, "
        f"{done.num_bytes:,} bytes, from {done.kind}"
    )
    for note in done.notes:
        typer.echo(f"note: {note}")
