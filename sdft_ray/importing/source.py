"""What the three kinds of sources have in common, and which kind a path is."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from sdft_ray.models.licence import Licence, find_licence
from sdft_ray.models.loading import quiet
from sdft_ray.models.size import DTYPE_BYTES

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}


@dataclass(frozen=True)
class Origin:
    """Where a model came from, for its card. `files` are those whose weights were read."""

    kind: str
    files: tuple[Path, ...]
    name: str = ""
    base_model: str = ""
    licence: Licence | None = None


class Source(Protocol):
    """A source whose headers were read and checked; no weight is in memory yet."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of the config.json to write."""
        ...

    @property
    def dtype(self) -> str:
        """That of the weights, or of what they become when they are dequantized: `float32`, `bfloat16`, `float16`."""
        ...

    @property
    def origin(self) -> Origin: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: what was lost, left out or supposed. Sentences without a full stop."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation according to the source, beside those of its config."""
        ...

    def load(self, dtype: str) -> Any:
        """The plain transformers model on the CPU. Raises `ModelError` if a weight would stay at its initial value."""
        ...

    def write_companions(self, directory: Path) -> None:
        """Tokenizer, chat template, generation config and licence, as far as the source has them."""
        ...


def widest(dtypes: set[str]) -> str:
    """The dtype that holds all values of `dtypes`: float16 and bfloat16 together need float32. No float64."""
    (only,) = dtypes if len(dtypes) == 1 else ("float32",)
    return only if only in TORCH_DTYPES else "float32"


def licence_in(*folders: Path) -> Licence | None:
    """`find_licence`, whose words are for a teacher, in the words of a source."""
    found = find_licence(folders)
    return found and replace(found, origin=found.origin.replace("the teacher's", "the source's"))


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """The progress bars of transformers, on a terminal only. Its reader of GGUF has one that no setting turns off."""
    if sys.stderr.isatty():
        yield
        return
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def linked(folder: Path, *, only: str = "", without: Sequence[str] = ()) -> Iterator[Path]:
    """Links to files of a folder: transformers uses whatever lies beside a model, such as adapters and tokenizers."""
    with tempfile.TemporaryDirectory(prefix="sdft-import-") as links:
        for path in folder.iterdir():
            if path.is_file() and path.name not in without and only in ("", path.name):
                (Path(links) / path.name).symlink_to(path.resolve())
        yield Path(links)
