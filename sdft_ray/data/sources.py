"""Reads seed and calibration rows from JSONL, Parquet or a named data set; checks each row and keeps their order."""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.data.example import ANSWER_KINDS, SEED_SCHEMA, example_id
from sdft_ray.data.hub import NAMED_SETS, first_turn, hub_records
from sdft_ray.errors import DataError

COLUMNS = ("id", "instruction", "reference", "answer_kind", "check", "family")
"""Columns of a source, under these names unless a mapping renames them."""

MESSAGES = "messages"
"""A conversation instead of instruction and reference: its first question and answer are used."""

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

CheckError = Callable[[str, str], str]
"""From the answer kind and the check of a row to what is wrong with them, or ""."""
Record = tuple[str, dict[str, Any]]
"""Position of a row ("line 7"), and its fields."""


def read_tables(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    answer_kind: str = "none",
    check: str = "",
    check_error: CheckError = lambda kind, check: "",
    limit: int | None = None,
    plain_text: bool = False,
    revision: str | None = None,
    table_rows: int = 8192,
) -> Iterator[pa.Table]:
    """Stream tables of `SEED_SCHEMA`, in the order of the source, at least one; `limit` takes the first n rows.

    `source` is a JSONL or Parquet file (a path or any fsspec URL; JSONL also with `.gz`) or one of
    `NAMED_SETS`, of which only the train split is ever read, at commit `revision` if given. `columns` maps
    our names (`COLUMNS`) to those of the file. `instruction` and `reference`, or `messages`, are required. A row
    without `id` is identified by its content, one without `answer_kind` or `check` gets the argument;
    `check_error` returns what is wrong with such a pair, or "". With `plain_text` (calibration sets) the instruction
    may be absent or empty: the reference is then text without a conversation.

    Memory use: one table of `table_rows` rows, and about 60 bytes per row read, to detect duplicate ids.

    Raises `DataError` with line (JSONL) or row (Parquet), both 1-based: missing or empty file, malformed
    JSON, missing column, wrong type, empty text, unknown answer kind, duplicate id.
    """
    columns = dict(columns or {})
    for ours in columns:
        if ours not in COLUMNS:
            raise DataError(f"unknown column {ours!r} in the mapping", _meant(ours, COLUMNS))
    if answer_kind not in ANSWER_KINDS:
        raise DataError(f"unknown answer kind {answer_kind!r}", _meant(answer_kind, ANSWER_KINDS))
    if source in NAMED_SETS and columns:
        raise DataError(f"{source} defines its columns itself", "remove `columns`, or give a file")

    def records() -> Iterator[Record]:
        rows = hub_records(source, revision) if source in NAMED_SETS else _file_records(source, columns)
        return islice(rows, limit)

    reader = _Reader(source, records, columns, (answer_kind, check), check_error, plain_text)
    for where, record in records():
        reader.add(where, record)
        if reader.num_pending == table_rows:
            yield reader.take()
    if not reader.known_ids:
        raise DataError(f"{source} has no rows", "give at least one row")
    if reader.num_pending:
        yield reader.take()


class _Reader:
    """Checks rows and collects them by column."""

    def __init__(
        self,
        source: str,
        records: Callable[[], Iterator[Record]],
        columns: Mapping[str, str],
        default: tuple[str, str],
        check_error: CheckError,
        plain_text: bool,
    ) -> None:
        self.source = source
        self.records = records
        self.names = {ours: columns.get(ours, ours) for ours in COLUMNS}
        required = {"reference"} if plain_text else {"instruction", "reference"}
        self.required = required | set(columns)
        self.answer_kind, self.check = default
        self.check_error = check_error
        self.plain_text = plain_text
        self.known_ids: set[int] = set()
        """Hashes of the ids so far; the ids of ten million rows would need too much memory."""
        self.pending: tuple[list[str], ...] = tuple([] for _ in SEED_SCHEMA.names)

    @property
    def num_pending(self) -> int:
        return len(self.pending[0])

    def add(self, where: str, record: dict[str, Any]) -> None:
        row = self._row(where, record)
        key = hash(row[0])
        if key in self.known_ids:
            self._refuse_twin(where, row[0])
        self.known_ids.add(key)
        for column, value in zip(self.pending, row, strict=True):
            column.append(value)

    def take(self) -> pa.Table:
        """The rows collected since the last call."""
        table = pa.table([pa.array(column, pa.string()) for column in self.pending], schema=SEED_SCHEMA)
        for column in self.pending:
            column.clear()
        return table

    def _row(self, where: str, record: dict[str, Any]) -> tuple[str, ...]:
        """The fields in the order of `SEED_SCHEMA`."""
        if MESSAGES in record and not {self.names["instruction"], self.names["reference"]} & record.keys():
            turn = first_turn(record[MESSAGES])
            if turn is None:
                what = f"`{MESSAGES}` does not start with a user message and an assistant message"
                raise self._error(where, what, "remove the row, or give instruction and reference")
            record = {**record, **{self.names[ours]: text for ours, text in turn.items()}}
        instruction = self._text(where, record, "instruction", empty=self.plain_text)
        reference = self._text(where, record, "reference", empty=False)
        kind = self._text(where, record, "answer_kind", empty=True) or self.answer_kind
        if kind not in ANSWER_KINDS:
            raise self._error(where, f"unknown answer kind {kind!r}", _meant(kind, ANSWER_KINDS))
        check = self._text(where, record, "check", empty=True) or (self.check if kind == self.answer_kind else "")
        if error := self.check_error(kind, check):
            raise self._error(where, error, "see the answer kinds in sdft_ray.generation.checks")
        family = self._text(where, record, "family", empty=True)
        row_id = self._explicit_id(where, record) or example_id(instruction, reference)
        return row_id, instruction, reference, kind, check, family

    def _explicit_id(self, where: str, record: dict[str, Any]) -> str:
        value = record.get(self.names["id"])
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(where, record, "id", empty=True)

    def _refuse_twin(self, where: str, row_id: str) -> None:
        """Raise `DataError` with the earlier row that has this id; reads the source again to find it."""
        for earlier, record in self.records():
            if earlier == where:
                return  # two different ids have the same hash
            if self._row(earlier, record)[0] == row_id:
                same = f"have the same id {row_id!r}"
                what = same if self._explicit_id(where, record) else "have the same instruction and reference"
                raise DataError(f"{self.source}: {earlier} and {where} {what}", "remove one, or change its id")

    def _text(self, where: str, record: dict[str, Any], ours: str, *, empty: bool) -> str:
        """The value of one column; "" if an optional one is absent or null."""
        name = self.names[ours]
        value = record.get(name)
        if isinstance(value, str):
            if not (empty or value.strip()):
                raise self._error(where, f"{ours} is empty", "add text, or remove the row")
            if not value.isascii() and not _encodable(value):
                raise self._error(where, f"{ours} contains a lone surrogate", "write the file as UTF-8 text")
            return value
        if name not in record and ours in self.required:
            raise self._missing_column(where, ours, list(record))
        if value is None and (empty or ours not in self.required):
            return ""
        raise self._error(where, f"{ours} must be text, not {_kind_of(value)}", "write it as a string")

    def _missing_column(self, where: str, ours: str, present: list[str]) -> DataError:
        name = self.names[ours]
        what = f"no column {name!r}" + (f" for {ours}" if name != ours else "")
        near = difflib.get_close_matches(name, present, 1, cutoff=0.5)
        hint = f"did you mean `columns: {{{ours}: {near[0]}}}`?" if near else f"map `{ours}` to one of these columns"
        return self._error(where, f"{what} (columns: {', '.join(present) or 'none'})", hint)

    def _error(self, where: str, what: str, hint: str) -> DataError:
        return DataError(f"{self.source}, {where}: {what}", hint)


def _file_records(source: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """Open a file and stream its rows."""
    path = Path(source.removesuffix(".gz"))
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        if "://" not in source and not Path(source).exists() and len(path.parts) == 1 and not path.suffix:
            raise DataError(f"no file or data set {source!r}", _meant(source, tuple(NAMED_SETS)))
        raise DataError(f"cannot read {source}: unknown file type", "give a .jsonl or .parquet file")
    try:
        # typed Any: fsspec promises a file object, its stub another type
        with cast(Any, fsspec.open(source, "rb", compression="infer")) as stream:
            yield from _json_records(source, stream) if kind == "jsonl" else _parquet_records(stream, columns)
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
    for number, line in enumerate(stream, start=1):
        where = f"line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.isspace():
                continue
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
            what = f"must be a JSON object, not {_kind_of(record)}"
            raise DataError(f"{source}, {where}: {what}", _json_hint(line))
        yield where, record


def _parquet_records(stream: Any, columns: Mapping[str, str]) -> Iterator[Record]:
    file = pq.ParquetFile(stream)
    present = file.schema_arrow.names
    needed = {MESSAGES, *(columns.get(ours, ours) for ours in COLUMNS)} & set(present)
    others = dict.fromkeys(name for name in present if name not in needed)
    number = 0
    for batch in file.iter_batches(columns=sorted(needed)):
        for row in batch.to_pylist():
            number += 1
            # the other names are added with None, for the message about a missing column
            yield f"row {number}", others | row


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _json_hint(line: bytes) -> str:
    if line.lstrip().startswith(b"["):
        return "this is a JSON array: write one object per line (jq -c '.[]')"
    return "write one JSON object per line"


def _meant(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"


def _near_file(source: str) -> str:
    path = Path(source)
    if "://" in source or not path.parent.is_dir():
        return "check the path"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"


def _one_line(reason: BaseException) -> str:
    return (str(reason).splitlines() or [type(reason).__name__])[0]
