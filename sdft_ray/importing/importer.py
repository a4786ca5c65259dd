"""`sdft import`: read a source of any kind, write a model folder, check it, and only then put it in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig

from sdft_ray.errors import ModelError, StoreError
from sdft_ray.importing import adapter, pickled
from sdft_ray.importing.adapter import AdapterSource
from sdft_ray.importing.card import CARD, SOURCE_CARD, card
from sdft_ray.importing.endings import write_generation_config
from sdft_ray.importing.gguf_file import GgufSource
from sdft_ray.importing.pickled import PickledSource
from sdft_ray.importing.source import Source, bars_on_terminals
from sdft_ray.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from sdft_ray.models.families import family_of
from sdft_ray.models.generation_config import GENERATION_CONFIG
from sdft_ray.models.loading import check_finite
from sdft_ray.models.size import DTYPE_BYTES, size_of
from sdft_ray.store.atomic import replacing

AUTO = "auto"
_SPARE_BYTES = 64 * 2**20
"""For tokenizer, config and card."""
_SHARD_BYTES = 5 * 2**30
_PICKLES = (pickled.SINGLE_FILE, pickled.INDEX_FILE)
_ADAPTERS = (adapter.CONFIG, adapter.WEIGHTS, adapter.PICKLED_WEIGHTS)


@dataclass(frozen=True)
class Imported:
    """A finished import. `notes` say what was lost, left out or supposed."""

    directory: Path
    kind: str
    model_type: str
    num_parameters: int
    dtype: str
    num_bytes: int
    notes: tuple[str, ...]


def import_model(
    source: Path,
    directory: Path,
    *,
    base: Path | None = None,
    dtype: str = AUTO,
    tell: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Write the model in `source` to `directory` as safetensors with tokenizer, chat template and generation config.

    `source`: a GGUF file or a folder with one, a folder with `pytorch_model.bin`, or a LoRA adapter (with `base`).
    `dtype` is that of the written weights; `auto` keeps the source's, and what is dequantized becomes float32. `tell`
    is called with a line before each step. Everything is checked before weights are read; `directory` appears last
    and whole. Raises `ModelError` for a source that cannot be read, `StoreError` for a place that cannot be written.
    """
    if dtype not in (AUTO, *DTYPE_BYTES):
        raise ModelError(f"dtype {dtype!r} is not supported", f"use auto or one of {', '.join(DTYPE_BYTES)}")
    check_free(directory)
    tell(f"checking {source}")
    found = open_source(source, base)
    family_of(found.config)
    written_dtype = found.dtype if dtype == AUTO else dtype
    size = size_of(found.config, dtype=written_dtype)
    check_room(directory, size.weight_bytes + _SPARE_BYTES)
    with _placing(directory) as partial:
        partial.mkdir()
        notes = [*found.notes, *_rounding(found.dtype, written_dtype), *_write(found, partial, written_dtype, tell)]
        notes += _left_out(source, found, partial)
        tell(f"checking {size.num_parameters:,} parameters")
        Checkpoint.open(partial).check_expected()
        check_finite(partial)
        result = Imported(
            directory, found.origin.kind, found.config["model_type"], size.num_parameters, written_dtype,
            sum(path.stat().st_size for path in partial.rglob("*")), tuple(notes),
        )  # fmt: skip
        (partial / CARD).write_text(card(found.origin, result), encoding="utf-8")
    return result


def open_source(source: Path, base: Path | None) -> Source:
    """Recognize the kind of a source by its files, and check it. Raises `ModelError`."""
    if not source.exists():
        raise ModelError(f"there is no {source}", "give a local file or folder; `hf download` fetches a repository")
    if source.is_dir() and (source / adapter.CONFIG).is_file():
        return AdapterSource.open(source, _base_of(source, base))
    if base is not None:
        raise ModelError(f"{source} holds no {adapter.CONFIG}, so that --base means nothing", "leave out --base")
    if source.is_file():
        if source.name in _PICKLES or source.suffix in (".bin", ".safetensors"):
            raise ModelError(f"{source} is a part of a model folder", f"give the folder: {source.parent}")
        return GgufSource.open(source)
    if _is_safetensors(source):
        raise ModelError(f"{source} is in safetensors already", "use it as it is, or name the file to import in it")
    if any((source / name).is_file() for name in _PICKLES):
        return PickledSource.open(source)
    if next(source.glob("pytorch_model-*.bin"), None):
        raise ModelError(f"{source} holds shards without {pickled.INDEX_FILE}", "download the index as well")
    return GgufSource.open(_only_gguf(source))


def _base_of(source: Path, base: Path | None) -> Path:
    """The folder with the base of an adapter: the one given, or the adapter's own where it holds a whole model."""
    if base is None:
        if (source / "config.json").is_file() and (
            _is_safetensors(source) or any((source / name).is_file() for name in _PICKLES)
        ):
            return source
        raise ModelError(f"{source} holds an adapter without its base model", "give the base as well: --base FOLDER")
    if not base.is_dir() or not (base / "config.json").is_file():
        raise ModelError(
            f"the base {base} is no model folder",
            "give a folder with config.json and weights",
        )
    return base


def _is_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise ModelError(
            f"{folder} holds nothing to import: no GGUF file, no {pickled.SINGLE_FILE}, no {adapter.CONFIG}",
            "give a GGUF file, a folder with pickled weights, or an adapter",
        )
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:4])
        raise ModelError(f"{folder} holds {len(files)} GGUF files: {names}", "give one of them")
    return files[0]


def check_free(directory: Path) -> None:
    """Raise `StoreError` unless `directory` is missing or an empty folder."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise StoreError(f"{directory} is not a folder", "give the name of a new folder")
    if directory.is_dir() and any(directory.iterdir()):
        raise StoreError(f"{directory} exists and is not empty", "give the name of a new folder")


def check_room(directory: Path, num_bytes: int) -> None:
    """Raise `StoreError` unless `num_bytes` fit on the disk of `directory`."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StoreError(
            f"{directory} needs {num_bytes:,} bytes and has {free:,} free", "free some space, or choose another disk"
        )


@contextmanager
def _placing(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that becomes it at the end. Raises `StoreError` if it cannot be written."""
    made = None
    try:
        with replacing(directory) as partial:
            yield partial
            made = partial.stat().st_ino
    except (OSError, SafetensorError) as reason:
        why = getattr(reason, "strerror", None) or str(reason)
        raise StoreError(f"{directory} cannot be written: {why}", "free some space, or choose another place") from None
    if directory.stat().st_ino != made:
        raise StoreError(f"{directory} was made by somebody else meanwhile", "give the name of a new folder")


def _write(found: Source, partial: Path, dtype: str, tell: Callable[[str], None]) -> list[str]:
    """All files except the card; returns notes. Companions come first: what the model writes takes their place."""
    found.write_companions(partial)
    for name in (CARD, *_ADAPTERS, *_PICKLES):
        (partial / name).unlink(missing_ok=True)
    (partial / "config.json").write_text(json.dumps(found.config), encoding="utf-8")
    config = AutoConfig.from_pretrained(str(partial), local_files_only=True, trust_remote_code=False)
    notes = write_generation_config(partial, config.to_dict(), found.end_ids)
    generation = (partial / GENERATION_CONFIG).read_bytes()
    tell(f"reading the weights of {found.origin.kind}")
    model: Any = found.load(dtype)
    tell("writing safetensors")
    model.generation_config = GenerationConfig()  # transformers refuses to write some; ours is written below
    with bars_on_terminals():
        model.save_pretrained(str(partial), max_shard_size=_SHARD_BYTES)
    (partial / GENERATION_CONFIG).write_bytes(generation)
    return notes


def _rounding(before: str, after: str) -> list[str]:
    wider = {("float16", "float32"), ("bfloat16", "float32")}
    if before == after or (before, after) in wider:
        return []
    return [f"the weights were rounded from {before} to {after}, as asked for"]


def _left_out(source: Path, found: Source, partial: Path) -> list[str]:
    """A note on the files of the source folder that are neither in the result nor converted. Keeps its card."""
    if not source.is_dir():
        return []
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, partial / SOURCE_CARD)
    used = {*found.origin.files, *(source / name for name in ("config.json", CARD, *_ADAPTERS, *_PICKLES))}
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path not in used]
    left = [str(path.relative_to(source)) for path in files if not (partial / path.name).exists()]
    left = [name for name in left if not name.startswith(".")]
    more = f" and {len(left) - 8} more" if len(left) > 8 else ""
    return [f"left out: {', '.join(left[:8])}{more}"] if left else []
