"""Which rows of a seed set still need an answer, and how they are divided into chunks of work.

A row has two identifiers. `example_id` names it in all artifacts: stages join by it, and the sampling seed is derived
from it. It may be given by the user, and then says nothing about the content. `row_key` (a digest of `example_id` and
of every field that affects the answers: texts, answer kind, check) decides whether a cached answer is still valid: a
row whose text or check has changed gets a new key and is sampled again, although its `example_id` stayed the same.

Keys, not positions, are compared with the cache, so rows may be added, removed or moved between runs. The state is a
few numpy arrays of 24 bytes per row, whatever the length of the texts.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

KEY_BYTES = 16
CHUNK_ROWS = 64

Keys = NDArray[np.void]
"""One 16-byte key per row."""


def row_key(*fields: str, context: str = "") -> bytes:
    """Digest of the fields, each with its length, so that moving text from one field to the next changes the key.

    `context` is one more field, but for rows without any: their keys are those of before there were contexts.

    It identifies a row together with its content; see the module docstring for why `example_id` alone does not suffice.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for field in (*fields, context) if context else fields:
        content = field.encode()
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.digest()


def keys_of(batches: Iterable[pa.RecordBatch | pa.Table], columns: Sequence[str]) -> Keys:
    """Keys of all rows, in order; `columns` are the fields of `row_key`, beside `context`."""
    keys = bytearray()  # millions of rows: no second copy to join
    for batch in batches:
        fields_of_rows = zip(*(batch[name].to_pylist() for name in columns), strict=True)
        contexts = batch["context"].to_pylist()
        rows = zip(fields_of_rows, contexts, strict=True)
        keys += b"".join(row_key(*fields, context=context) for fields, context in rows)
    return np.frombuffer(keys, dtype=f"V{KEY_BYTES}")


@dataclass(frozen=True)
class Chunk:
    """A unit of work: positions of rows, and a name derived from their keys alone."""

    name: str
    positions: NDArray[np.int32]


def runs_of(positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ascending positions as contiguous runs: first, length, first, length, ...; usually one run."""
    firsts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    lengths = np.diff(firsts, append=len(positions))
    return np.stack([positions[firsts], lengths.astype(np.int32)], axis=1).ravel()


def positions_of(runs: Sequence[int]) -> NDArray[np.int64]:
    """The inverse of `runs_of`."""
    return np.concatenate([np.arange(first, first + length) for first, length in zip(*[iter(runs)] * 2, strict=True)])


class Ledger:
    """Records which source contains the answer of each row of a seed set.

    A source is anything that `load` turns into a table with a `row_key` column: parts of the row cache, a row group.
    """

    def __init__(self, keys: Keys) -> None:
        assert len(keys) < 2**31, "positions are int32"
        self.num_rows = len(keys)
        # numpy sorts byte strings but not void; at a fixed length, stripped trailing zeros make no two keys equal.
        self._keys = keys.view(f"S{KEY_BYTES}")
        self._order: NDArray[np.int64] | None = None
        self._source_of = np.full(len(keys), -1, dtype=np.int32)
        self._sources: list[Any] = []

    def find(self, source: Any, keys: Keys) -> int:
        """Record that `source` answers the rows with these keys; returns how many of them were missing until now."""
        if self._order is None:
            self._order = np.argsort(self._keys, kind="stable")
        if not self.num_rows or not len(keys):
            return 0
        known = self._keys[self._order]
        places = np.searchsorted(known, keys.view(f"S{KEY_BYTES}")).clip(max=self.num_rows - 1)
        hits = known[places] == keys.view(f"S{KEY_BYTES}")
        positions = np.unique(self._order[places[hits]])
        return self.place(source, positions[self._source_of[positions] < 0])

    def place(self, source: Any, positions: NDArray[Any]) -> int:
        """Record that `source` answers the rows at `positions`; returns how many."""
        if len(positions):
            self._source_of[positions] = len(self._sources)
            self._sources.append(source)
        return len(positions)

    def sources(self) -> Sequence[Any]:
        """All recorded sources."""
        return self._sources

    def sources_of(self, positions: NDArray[np.int32]) -> list[Any]:
        """The sources that answer any of the rows at `positions`."""
        return [self._sources[source] for source in np.unique(self._source_of[positions]) if source >= 0]

    def missing(self) -> NDArray[np.int32]:
        """Positions without an answer, ascending."""
        return np.flatnonzero(self._source_of < 0).astype(np.int32)

    def draw(self, num_rows: int, seed: int) -> NDArray[np.int32]:
        """Positions of a random sample of all rows, in random order; fewer rows are the beginning of more.

        Which rows are drawn follows from their keys and `seed`: rows that come or go change nothing about the others.
        """
        keys = self._keys.tobytes()
        places = range(0, len(keys), KEY_BYTES)
        drawn = heapq.nsmallest(num_rows, places, key=lambda place: _rank(keys[place : place + KEY_BYTES], seed))
        return np.array(drawn, dtype=np.int32) // KEY_BYTES

    def chunks(self, first: NDArray[np.int32] | None = None) -> Iterator[Chunk]:
        """The missing rows in chunks of at most `CHUNK_ROWS`: those at the positions `first`, in that order, before all
        others."""
        missing = self.missing()
        drawn = missing[:0] if first is None else first[np.isin(first, missing)]
        for part in (drawn, np.setdiff1d(missing, drawn, assume_unique=True)):
            for start in range(0, len(part), CHUNK_ROWS):
                positions = np.sort(part[start : start + CHUNK_ROWS])
                digest = hashlib.blake2b(self._keys[positions].tobytes(), digest_size=8)
                yield Chunk(digest.hexdigest(), positions)

    def assemble(self, load: Callable[[Any], pa.Table], *, window_rows: int = 4096) -> Iterator[pa.Table]:
        """All answers in the order of the seed set, one window of rows at a time; every row must have a source.

        Raises `KeyError` if a source lacks a row that was recorded for it.
        """
        loaded: dict[int, pa.Table] = {}
        for start in range(0, self.num_rows, window_rows):
            source_of = self._source_of[start : start + window_rows]
            assert (source_of >= 0).all(), "assemble only when no row is missing"
            loaded = {int(s): loaded[s] if s in loaded else load(self._sources[s]) for s in np.unique(source_of)}
            tables, places = [], []
            for source, table in loaded.items():
                needed = start + np.flatnonzero(source_of == source)
                rows, counts = _rows_of(table, self._keys[needed])
                tables.append(table.take(pa.array(rows)))
                places.append(np.repeat(needed, counts))
            # Stable: samples of the same row stay in order.
            yield pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places), kind="stable")))


def _rank(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()


def _rows_of(table: pa.Table, needed: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of all samples of the given keys, key by key, and the number of samples of each key.

    If two workers have both written a chunk, the rows of the first one are used.
    """
    keys = table_keys(table).view(f"S{KEY_BYTES}")
    order = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[order], needed, side="left")
    counts = np.searchsorted(keys[order], needed, side="right") - first
    if not counts.all():
        raise KeyError("a source lacks a row that was recorded for it")
    rank = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    rows = order[np.repeat(first, counts) + rank]
    fresh = table["sample_index"].to_numpy()[rows] == rank
    return rows[fresh], np.add.reduceat(fresh, counts.cumsum() - counts) if len(counts) else counts


def table_keys(table: pa.Table) -> Keys:
    """The `row_key` column (fixed-size binary) as an array."""
    column = table["row_key"].combine_chunks()
    buffer = column.buffers()[1]
    data = np.frombuffer(buffer, dtype=f"V{KEY_BYTES}") if buffer is not None else np.empty(0, dtype=f"V{KEY_BYTES}")
    return data[column.offset : column.offset + len(column)]
