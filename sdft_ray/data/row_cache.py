"""Cache of finished rows of one sampling configuration: small immutable Parquet parts on any fsspec store.

A cache belongs to one configuration (teacher, tokenizer and template, sampling), stored in its `identity.json`; other
configurations are refused. A part contains finished rows of one chunk of work. Its name consists of the chunk, a number
and the digest of its bytes: `ab1/ab12...-0-<digest>.parquet`. So a worker that continues a chunk finds its parts by
name, and a truncated or modified part is detected when it is read. Parts are written atomically and never rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.errors import StoreError
from sdft_ray.store.atomic import write_to
from sdft_ray.store.fingerprint import canonical_json

IDENTITY = "identity.json"
_SHARD = 3
_DIGEST_HEX = 16


class RowCache:
    """One directory of parts. Cheap to construct: processes exchange its `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.url)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Create the cache, or check that it belongs to `identity`. Raises `StoreError` with the fields that differ."""
        text = canonical_json(identity)
        try:
            stored = self._fs.cat_file(f"{self._root}/{IDENTITY}").decode()
        except FileNotFoundError:
            self._fs.makedirs(self._root, exist_ok=True)
            self._put(IDENTITY, text.encode())
            return
        if stored != text:
            theirs: Any = None
            with contextlib.suppress(ValueError):
                theirs = json.loads(stored)
            differing = ", ".join(_differing(theirs, json.loads(text))) or "its identity cannot be read"
            raise StoreError(
                f"the row cache {self.url} belongs to another configuration: {differing}",
                "use another cache, or restore these fields",
            )

    def write(self, chunk: str, number: int, rows: pa.Table) -> str:
        """Commit finished rows of a chunk; returns the name of the part."""
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", compression_level=1, write_statistics=False)
        content = sink.getvalue().to_pybytes()
        name = f"{chunk[:_SHARD]}/{chunk}-{number}-{_digest(content)}.parquet"
        self._put(name, content)
        return name

    def parts_of(self, chunk: str) -> list[str]:
        """Names of the parts of a chunk, by number."""
        names = [name for name in self._names(f"{chunk[:_SHARD]}") if name.split("/")[1].startswith(f"{chunk}-")]
        return sorted(names, key=_number)

    def parts(self) -> Iterator[str]:
        """Names of all parts, sorted, shard by shard."""
        try:
            shards = sorted(str(entry).rsplit("/", 1)[-1] for entry in self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return
        for shard in shards:
            if len(shard) == _SHARD:
                yield from self._names(shard)

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The rows of a part, with all or some columns. A damaged part is deleted, and None returned."""
        content = self._fs.cat_file(f"{self._root}/{name}")
        if _digest(content) == name.rsplit("-", 1)[1].removesuffix(".parquet"):
            return pq.ParquetFile(pa.BufferReader(content)).read(columns=columns, use_threads=False)
        self.remove(name)
        return None

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def _names(self, shard: str) -> list[str]:
        try:
            paths = self._fs.ls(f"{self._root}/{shard}", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = [f"{shard}/{str(path).rsplit('/', 1)[-1]}" for path in paths]
        return sorted(name for name in names if name.endswith(".parquet"))

    def _put(self, name: str, content: bytes) -> None:
        # Not flushed to disk: a part that a power cut tore shows by the digest in its name.
        write_to(self._fs, f"{self._root}/{name}", content, sync=False)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_HEX]


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _differing(theirs: Any, ours: Any) -> list[str]:
    if not isinstance(theirs, dict):
        return []
    missing = object()
    return [
        f"{name} ({theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here)"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name, missing) != ours.get(name, missing)
    ]
