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
def replacing(target: Path, *, partial: str = "", sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `target` to write a file or folder to; it takes the target's place when the block ends.

    A file is flushed to disk first (`sync`) and replaces an existing file. A folder takes a free place only: where
    another process was first, that one's stays. After an exception the target is untouched, and nothing is left
    beside it. `partial` names the temporary neighbour; by default its name is used by nobody else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(partial or f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield beside
        if beside.is_dir():
            with contextlib.suppress(OSError):
                beside.rename(target)
            if not target.is_dir():
                raise FileNotFoundError(f"{beside} could not be moved to {target}")
        else:
            if sync:
                _sync(beside)
            beside.replace(target)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def write_file(target: Path, data: bytes | str, *, mode: int = 0o666, sync: bool = True) -> None:
    """Write a local file whole; text is stored as UTF-8. `mode` holds the permissions of a new file, before umask."""
    with replacing(target, sync=sync) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)


def write_to(filesystem: Any, target: str, data: bytes | str, *, sync: bool = True) -> None:
    """`write_file` on any fsspec file system. Object stores show an object only once it is whole."""
    if isinstance(filesystem, LocalFileSystem):
        write_file(Path(target), data, sync=sync)
        return
    content = data.encode() if isinstance(data, str) else data
    try:
        filesystem.pipe_file(target, content)
    except FileNotFoundError:  # one with real folders, which are made when they are missing
        filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        filesystem.pipe_file(target, content)


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
