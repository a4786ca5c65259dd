"""Atomic writes: a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` to write a file or folder to; it takes the target's place when the block ends.

    A file is flushed to disk first and replaces an existing file. A folder takes a free place alone: where another
    process was first, that one's stays. After an exception the target is untouched, and nothing is left beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        if partial.is_dir():
            with contextlib.suppress(OSError):
                partial.rename(target)
            if not target.is_dir():
                raise FileNotFoundError(f"{partial} could not be moved to {target}")
        else:
            _sync(partial)
            partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_file(target: Path, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write a local file whole; text is stored as UTF-8. `mode` holds the permissions of a new file, before umask."""
    with replacing(target) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)


def write_to(filesystem: Any, target: str, data: bytes | str) -> None:
    """`write_file` on any fsspec file system. Object stores show an object only once it is whole."""
    if isinstance(filesystem, LocalFileSystem):
        write_file(Path(target), data)
        return
    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(target, data.encode() if isinstance(data, str) else data)


def create(filesystem: Any, target: str, data: bytes) -> bool:
    """Write an object unless there is one of that name; whether this call wrote it.

    For file systems that are not local, where `pipe_file(mode="create")` is a conditional request (S3:
    `If-None-Match: *`; GCS: generation 0). One whose driver has no such request looks before it writes, and reads back
    what has stayed.
    """
    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    try:
        filesystem.pipe_file(target, data, mode="create")
    except FileExistsError:
        return False
    filesystem.invalidate_cache(target)
    return filesystem.cat_file(target) == data


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
