"""Canonical JSON and digests: the identity of everything in the store."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 8 * 2**20


def canonical_json(value: Any) -> str:
    """The one JSON text of a plain value: sorted keys, no spaces, UTF-8, finite numbers.

    Raises `TypeError` for anything that has no stable form (sets, paths, objects, NaN), rather than `str()` it.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no canonical form")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if bad := next((key for key in value if not isinstance(key, str)), None):
            raise TypeError(f"key {bad!r} is no string")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no canonical form")


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def listed_files(directory: Path) -> list[Path]:
    """Regular files below a directory in a stable order; hidden files and caches do not count."""
    found = (path for path in directory.rglob("*") if path.is_file())
    visible = (
        p for p in found if not any(part.startswith((".", "__pycache__")) for part in p.relative_to(directory).parts)
    )
    return sorted(visible, key=lambda path: path.relative_to(directory).as_posix())


def content_digest(path: Path, digest: Callable[[Path], str] = file_digest) -> str:
    """Digest of a file, or of a directory as the digests of its files under their relative names."""
    if path.is_dir():
        names = {file.relative_to(path).as_posix(): digest(file) for file in listed_files(path)}
        return fingerprint(names)
    return digest(path)
