"""A folder as a destination: a local directory, or a URL that fsspec can write to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from sdft_ray.errors import StoreError, UserError
from sdft_ray.release.files import CHUNK_BYTES, ReleaseFile, Watch, is_visible
from sdft_ray.store.atomic import replacing
from sdft_ray.store.urls import without_secrets

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CREDENTIALS = re.compile(r"//[^/\s@]+@")
_RESUME = "files that have arrived are not sent twice"


class Folder:
    """Local files are written atomically; elsewhere fsspec's driver uploads them."""

    repository = ""

    def __init__(self, url: str) -> None:
        local = "://" not in url or url.startswith(("file://", "local://"))
        path = url.removeprefix("file://").removeprefix("local://")
        given = str(Path(path).expanduser().resolve()) if local else url.rstrip("/")
        self.url = given if local else without_secrets(given)
        with self._failing("opened"):
            self._fs, root = fsspec.core.url_to_fs(given)
        self._root = str(root).rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def names(self) -> list[str]:
        with self._failing("read"):
            self._fs.invalidate_cache()
            if self._fs.isfile(self._root):
                raise StoreError(f"{self.url} is a file", "give a folder; it is created if missing")
            try:
                paths = self._fs.find(self._root)
            except FileNotFoundError:
                return []
        names = (str(path).removeprefix(self._root).lstrip("/") for path in paths)
        return sorted(name for name in names if is_visible(name))

    def holds(self, piece: ReleaseFile) -> bool:
        path = self._path(piece.name)
        with self._failing("read"):
            if not self._fs.isfile(path) or self._fs.size(path) != piece.num_bytes:
                return False
            digest = hashlib.sha256()
            with self._fs.open(path, "rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest() == piece.sha256

    def read(self, name: str) -> bytes:
        with self._failing("read"):
            return self._fs.cat_file(self._path(name))

    def send(self, pieces: Sequence[ReleaseFile], watch: Watch) -> None:
        if self._is_local:
            self._check_room(sum(piece.num_bytes for piece in pieces))
        for piece in pieces:
            with self._failing("written"):
                (self._write if self._is_local else self._upload)(piece, watch)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_room(self, num_bytes: int) -> None:
        existing = next(path for path in (Path(self._root), *Path(self._root).parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < num_bytes:
            message = f"{self.url} needs {num_bytes:,} bytes and has {free:,} free"
            raise StoreError(message, "free some space, or choose another destination")

    def _write(self, piece: ReleaseFile, watch: Watch) -> None:
        target = Path(self._path(piece.name))
        digest, num_bytes = hashlib.sha256(), 0
        # Pushes of one file share the temporary name: the next one writes over what a killed push has left.
        with replacing(target, partial=f".sdft-{piece.sha256[:12]}.partial") as partial:
            with partial.open("wb") as out:
                for chunk in piece.chunks():
                    out.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    watch(piece.name, num_bytes)
            if digest.hexdigest() != piece.sha256:
                raise StoreError(f"{piece.name} changed while it was sent", "run sdft verify, then push again")

    def _upload(self, piece: ReleaseFile, watch: Watch) -> None:
        path = self._path(piece.name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(piece.content, bytes):
            self._fs.pipe_file(path, piece.content)
        else:
            callback = Callback(hooks={"watch": lambda size, value, **_: watch(piece.name, value)})
            self._fs.put_file(str(piece.content), path, callback=callback)
        self._fs.invalidate_cache()
        arrived = self._fs.size(path)
        if arrived != piece.num_bytes:
            message = f"{piece.name} in {self.url} has {arrived:,} of {piece.num_bytes:,} bytes"
            raise StoreError(message, f"push again; {_RESUME}")
        watch(piece.name, piece.num_bytes)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turn any error of a driver into one line with a next step."""
        try:
            yield
        except UserError:
            raise
        except Exception as reason:  # noqa: BLE001  (errors of the drivers, such as botocore's, have no common base)
            raise StoreError(f"{self.url} cannot be {what}: {_line(reason)}", _hint(reason)) from None


def _line(reason: BaseException) -> str:
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return _CREDENTIALS.sub("//", (text.splitlines() or [""])[0].strip()) or type(reason).__name__


def _hint(reason: Exception) -> str:
    if isinstance(reason, ImportError):
        return "install the driver, such as sdft_ray[s3] or sdft_ray[gcs]"
    if isinstance(reason, ValueError):
        return "give hf://OWNER/NAME, a path, or a URL such as s3://BUCKET/FOLDER"
    if isinstance(reason, OSError) and reason.errno in _FULL:
        return f"free some space, then push again; {_RESUME}"
    if isinstance(reason, PermissionError | FileExistsError | NotADirectoryError | NotImplementedError):
        return "choose a destination that you can write to"
    return f"check address, credentials and network, then push again; {_RESUME}"
