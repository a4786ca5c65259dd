"""Reads seed and calibration rows from files or a named data set; checks each row and keeps their order.

Names of columns and shapes of conversations are those of `sdft_ray.data.layouts` and `conversations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from sdft_ray.data.conversations import Answered, Turns, answered, num_answers
from sdft_ray.data.example import ANSWER_KINDS, SEED_SCHEMA, example_id
from sdft_ray.data.hub import LEFT_OUT, NAMED_SETS, hub_records
from sdft_ray.data.layouts import COLUMNS, Layout, Mapped, compose, offers_tools, text_of, value_at
from sdft_ray.data.reading import Reading
from sdft_ray.data.row_files import Record, file_records, meant
from sdft_ray.errors import DataError

CheckError = Callable[[str, str], str]
"""From the answer kind and the check of a row to what is wrong with them, or ""."""
NUM_CONFLICTS = 10
"""Ids of several rows that an error names."""
TWIN = "an earlier row has the same prompt and answer"


def read_tables(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    answer_kind: str = "none",
    check: str = "",
    check_error: CheckError = lambda kind, check: "",
    limit: int | None = None,
    plain_text: bool = False,
    turns: Turns = "last",
    revision: str | None = None,
    table_rows: int = 8192,
    reading: Reading | None = None,
) -> Iterator[pa.Table]:
    """Stream tables of `SEED_SCHEMA`, in the order of the source, at least one; `limit` takes its first n rows.

    `source` is a JSON Lines, JSON or Parquet file (a path or any fsspec URL; JSON also with `.gz`) or one of
    `NAMED_SETS`, of which only the train split is ever read, at commit `revision` if given. `columns` maps
    our names (`COLUMNS`) to those of the file; columns with usual names need no mapping. A row without `id` is
    identified by its content, one without `answer_kind` or `check` gets the argument; `check_error` returns what is
    wrong with such a pair, or "". `turns` says which answers of a conversation become rows: with `all`, those of one
    with several get the ids ID#1, ID#2, ... With `plain_text` (calibration sets) rows may be text without a question.

    Rows without an answer or a question to train on, rows that offer tools, and rows with prompt and answer of an
    earlier one are left out and counted in `reading`.

    Memory use: one table of `table_rows` rows, and about 250 bytes per row read, to detect twins.

    Raises `DataError` with line (JSON Lines), item (JSON) or row (Parquet), all 1-based: missing or empty file,
    malformed JSON, columns that are missing or not clear, wrong types, unknown answer kind, parts that are not text.
    Also for one id with several contents, and where no row is left.
    """
    columns = dict(columns or {})
    for ours in columns:
        if ours not in COLUMNS:
            raise DataError(f"unknown column {ours!r} in the mapping", meant(ours, COLUMNS))
    if answer_kind not in ANSWER_KINDS:
        raise DataError(f"unknown answer kind {answer_kind!r}", meant(answer_kind, ANSWER_KINDS))
    if source in NAMED_SETS and columns:
        raise DataError(f"{source} defines its columns itself", "remove `columns`, or give a file")

    def records() -> Iterator[Record]:
        rows = hub_records(source, revision) if source in NAMED_SETS else file_records(source)
        return islice(rows, limit)

    reader = _Reader(source, Mapped(columns, plain_text), (answer_kind, check), check_error, turns, reading)
    for where, record in records():
        reader.add(where, record)
        if reader.num_pending >= table_rows:
            yield reader.take()
    reader.check_end(records)
    if reader.num_pending:
        yield reader.take()


_Row = tuple[str, ...]
"""The fields of `SEED_SCHEMA`, in its order."""


class _Reader:
    """Checks rows and collects them by column."""

    def __init__(
        self,
        source: str,
        mapped: Mapped,
        default: tuple[str, str],
        check_error: CheckError,
        turns: Turns,
        reading: Reading | None,
    ) -> None:
        self.source = source
        self.mapped = mapped
        self.answer_kind, self.check = default
        self.check_error = check_error
        self.turns: Turns = turns
        self.reading = Reading() if reading is None else reading
        self.num_rows = 0
        self.layouts: dict[tuple[tuple[str, ...], tuple[bool, ...]], Layout] = {}
        # Hashes alone: the ids and texts of ten million rows would need too much memory.
        self.content_of: dict[int, int] = {}
        """Id -> content of its row."""
        self.contents: set[int] = set()
        self.conflicts: dict[str, str] = {}
        """Id -> the second row that has it, with another content."""
        self.num_conflicts = 0
        self.pending: tuple[list[str], ...] = tuple([] for _ in SEED_SCHEMA.names)

    @property
    def num_pending(self) -> int:
        return len(self.pending[0])

    def add(self, where: str, record: dict[str, Any]) -> None:
        self.reading.num_read += 1
        for row in self._rows(where, record):
            content = hash(row[1:6])
            known = self.content_of.setdefault(hash(row[0]), content)
            if content in self.contents:
                self.reading.left_out[TWIN] += 1
                continue
            if known != content:
                self.num_conflicts += 1
                if len(self.conflicts) < NUM_CONFLICTS:
                    self.conflicts.setdefault(row[0], where)
                continue
            self.contents.add(content)
            self.num_rows += 1
            for column, value in zip(self.pending, row, strict=True):
                column.append(value)

    def take(self) -> pa.Table:
        """The rows collected since the last call."""
        table = pa.table([pa.array(column, pa.string()) for column in self.pending], schema=SEED_SCHEMA)
        for column in self.pending:
            column.clear()
        return table

    def check_end(self, records: Callable[[], Iterator[Record]]) -> None:
        """Raise `DataError` for ids of several contents, and where there is no row; reads the source again for the
        places of such ids."""
        if self.conflicts:
            raise self._conflict(records)
        if self.num_rows:
            return
        if not self.reading.num_read:
            raise DataError(f"{self.source} has no rows", "give at least one row")
        reasons = "; ".join(f"{number:,}: {why}" for why, number in self.reading.left_out.most_common())
        raise DataError(
            f"{self.source}: none of its {self.reading.num_read:,} rows can be trained on ({reasons})",
            "give rows that end with an answer in text, as `instruction` and `reference` or as `messages`",
        )

    def _conflict(self, records: Callable[[], Iterator[Record]]) -> DataError:
        first: dict[str, str] = {}
        counted, self.reading = self.reading, Reading()
        for where, record in records():
            for row in self._rows(where, record):
                if row[0] in self.conflicts:
                    first.setdefault(row[0], where)
            if len(first) == len(self.conflicts):
                break
        self.reading = counted
        named = ", ".join(f"{name!r} ({first[name]} and {where})" for name, where in self.conflicts.items())
        num, more = self.num_conflicts, self.num_conflicts - len(self.conflicts)
        return DataError(
            f"{self.source}: rows with the id of an earlier row but another content ({num:,}): {named}"
            + (f" and {more:,} more" if more else ""),
            "change these ids, or set `columns: {id: ''}` to identify rows by their content",
        )

    # --- one row ----------------------------------------------------------------------------------------

    def _rows(self, where: str, record: dict[str, Any]) -> list[_Row]:
        """What a row of the source gives: none, one, or several in a conversation. Counts what is left out."""
        try:
            answers = self._answers(record)
            fields = self._fields(record) if answers else ("", "", "")
            own = self._own_id(record) if answers else ""
        except DataError as error:
            raise DataError(f"{self.source}, {where}: {error.message}", error.hint) from None
        last = answers[-1] if answers else Answered("", "", "")
        for answer in answers:
            for name, text in zip(("instruction", "context", "reference"), answer, strict=True):
                if not text.isascii() and not _encodable(text):
                    what = f"{self.source}, {where}: {name} contains a lone surrogate"
                    raise DataError(what, "write the file as UTF-8 text")
        name = own or example_id(last.instruction, last.reference, last.context)
        return [
            (f"{name}#{number}" if len(answers) > 1 else name, a.instruction, a.context, a.reference, *fields)
            for number, a in enumerate(answers, 1)
        ]

    def _answers(self, record: dict[str, Any]) -> list[Answered]:
        if LEFT_OUT in record:
            self.reading.left_out[record[LEFT_OUT]] += 1
            return []
        layout = self._layout(record)
        if not layout.conversation and not layout.question:
            text = text_of(record, layout.answer, "reference")
            if not text.strip():
                self.reading.left_out["the text is empty"] += 1
                return []
            return [Answered("", "", text)]
        if offers_tools(record, layout):
            self.reading.left_out["the row offers tools, which no prompt of ours lists"] += 1
            return []
        messages = compose(record, layout)
        rows, reasons = answered(messages, self.turns)
        self.reading.left_out.update(reasons)
        if rows and self.turns == "last":
            self.reading.num_earlier += num_answers(messages) - 1
        return rows

    def _layout(self, record: dict[str, Any]) -> Layout:
        filled = tuple(value is not None and value != "" and value != [] for value in record.values())
        key = (tuple(record), filled)
        layout = self.layouts.get(key)
        if layout is None:
            layout = self.layouts[key] = self.mapped.layout(record)
            self.reading.unused |= dict.fromkeys(layout.unused)
        self.reading.layouts[str(layout)] += 1
        return layout

    def _fields(self, record: dict[str, Any]) -> tuple[str, str, str]:
        """Answer kind, check and family."""
        kind = self._own(record, "answer_kind") or self.answer_kind
        if kind not in ANSWER_KINDS:
            raise DataError(f"unknown answer kind {kind!r}", meant(kind, ANSWER_KINDS))
        check = self._own(record, "check") or (self.check if kind == self.answer_kind else "")
        if error := self.check_error(kind, check):
            raise DataError(error, "see the answer kinds in sdft_ray.generation.checks")
        return kind, check, self._own(record, "family")

    def _own_id(self, record: dict[str, Any]) -> str:
        value = value_at(record, self.mapped.columns.get("id", "id"))
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._own(record, "id")

    def _own(self, record: dict[str, Any], ours: str) -> str:
        """The text of a column that is about the row; "" where there is none."""
        name = self.mapped.columns.get(ours, ours)
        if name and ours in self.mapped.columns and name.split(".")[0] not in record:
            present = ", ".join(record) or "none"
            raise DataError(f"no column {name!r} for {ours} (columns: {present})", "correct `columns`")
        text = text_of(record, name, ours)
        if not text.isascii() and not _encodable(text):
            raise DataError(f"{ours} contains a lone surrogate", "write the file as UTF-8 text")
        return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
