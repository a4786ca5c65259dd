"""Streams the rows of a JSON Lines, JSON or Parquet file, each with its place."""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.data.conversations import kind_of
from sdft_ray.data.hub import NAMED_SETS
from sdft_ray.errors import DataError

Record = tuple[str, dict[str, Any]]
"""Position of a row ("line 7"), and its fields."""

_SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


def file_records(source: str) -> Iterator[Record]:
    """Open a file and stream its rows. Raises `DataError` for what cannot be read, with the line."""
    path = Path(source.removesuffix(".gz"))
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        if "://" not in source and not Path(source).exists() and len(path.parts) == 1 and not path.suffix:
            raise DataError(f"no file or data set {source!r}", meant(source, tuple(NAMED_SETS)))
        raise DataError(f"cannot read {source}: unknown file type", "give a .jsonl, .json or .parquet file")
    try:
        # typed Any: fsspec promises a file object, its stub another type
        with cast(Any, fsspec.open(source, "rb", compression="infer")) as stream:
            yield from _json_records(source, stream) if kind == "json" else _parquet_records(stream)
    except FileNotFoundError:
        raise DataError(f"no file {source}", _near_file(source)) from None
    except (pa.ArrowException, OSError, EOFError, zlib.error) as reason:
        raise DataError(
            f"cannot read {source}: {_one_line(reason)}", "check that the file is complete and readable"
        ) from None
    except (ImportError, ValueError) as reason:
        if isinstance(reason, DataError):
            raise
        raise DataError(f"cannot open {source}: {_one_line(reason)}", "check the address") from None


def _json_records(source: str, stream: Any) -> Iterator[Record]:
    nothing_yet = True
    for number, line in enumerate(stream, start=1):
        where = f"line {number}"
        if nothing_yet and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _array_records(source, line + stream.read())
            return
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.isspace():
                continue
            nothing_yet = False
            record = json.loads(text)
        except UnicodeDecodeError:
            raise DataError(f"{source}, {where}: not UTF-8 text", "save the file as UTF-8") from None
        except json.JSONDecodeError as reason:
            what = f"not valid JSON: {reason.msg} at column {reason.colno}"
            raise DataError(f"{source}, {where}: {what}", _json_hint(line)) from None
        except (RecursionError, ValueError):
            raise DataError(
                f"{source}, {where}: JSON with too many levels, or a number that is too long", _json_hint(line)
            ) from None
        if not isinstance(record, dict):
            what = f"must be a JSON object, not {kind_of(record)}"
            raise DataError(f"{source}, {where}: {what}", _json_hint(line))
        yield where, record


def _array_records(source: str, content: bytes) -> Iterator[Record]:
    """The objects of one JSON array, which is read whole."""
    try:
        items = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{source}: not UTF-8 text", "save the file as UTF-8") from None
    except json.JSONDecodeError as reason:
        what = f"not valid JSON: {reason.msg} at column {reason.colno}"
        raise DataError(f"{source}, line {reason.lineno}: {what}", "write one JSON object per line") from None
    except (RecursionError, ValueError):
        what = "JSON with too many levels, or a number that is too long"
        raise DataError(f"{source}: {what}", "write one JSON object per line") from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            what = f"must be a JSON object, not {kind_of(item)}"
            raise DataError(f"{source}, item {number}: {what}", "write an array of objects")
        yield f"item {number}", item


def _parquet_records(stream: Any) -> Iterator[Record]:
    file = pq.ParquetFile(stream)
    others = {field.name: None for field in file.schema_arrow if not _is_text(field.type)}
    names = [name for name in file.schema_arrow.names if name not in others]
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=names):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", {name: _without_nulls(value) for name, value in row.items()} | others


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column may hold anything that is read: not images, sound or embeddings, which are large."""
    if pa.types.is_struct(kind):
        return all(_is_text(part.type) for part in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type) and not pa.types.is_floating(kind.value_type)
    return not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_list(kind))


def _without_nulls(value: Any) -> Any:
    """A value without the empty fields that a column of objects gives to each of them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _json_hint(line: bytes) -> str:
    if line.lstrip().startswith(b"["):
        return "this is a JSON array: write one object per line (jq -c '.[]')"
    return "write one JSON object per line"


def _near_file(source: str) -> str:
    path = Path(source)
    if "://" in source or not path.parent.is_dir():
        return "check the path"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def meant(word: str, known: tuple[str, ...]) -> str:
    """The known word that is nearest, or all of them."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"


def _one_line(reason: BaseException) -> str:
    return (str(reason).splitlines() or [type(reason).__name__])[0]
