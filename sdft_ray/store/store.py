"""The store: artifacts at `ROOT/<stage>/<16 hex>/`, on a local path or any fsspec URL.

A step fills a work directory, `place` stages its files, and `commit` makes them the artifact, manifest last. A crash
at any point leaves either a committed artifact or none. A work directory is stable, so a killed step continues where
it stopped. On a local root, workers of several nodes need it on a shared file system.

Several drivers may make one step at the same time, on machines that share nothing but the store. None touches what
another has written, and the first commit wins:

    local       files wait in a folder of their own below the work directory; `commit` adds the manifest and renames
                that folder to the address, which fails where there is an artifact
    elsewhere   files are uploaded to `ADDRESS/<16 hex>/`, named by their digests; the manifest names that folder, and
                is put by a conditional request, which fails where there is one

The commit of a later driver takes over the artifact that is there and removes its own files. Files of a driver that was
killed before its commit are removed by the next commit of that step; `unfinished` lists them until then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from sdft_ray.errors import StoreError
from sdft_ray.store.atomic import create, replacing, write_file, write_to
from sdft_ray.store.fingerprint import content_digest, file_digest, fingerprint, listed_files
from sdft_ray.store.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
ADDRESS_HEX = 16


def address_of(stage: str, fingerprint: str) -> str:
    return f"{stage}/{fingerprint[:ADDRESS_HEX]}"


class Store:
    """One root. Cheap to make, so processes exchange its `url`, never the object."""

    def __init__(self, url: str) -> None:
        local = "://" not in url or url.startswith("file://")
        self.url = str(Path(url.removeprefix("file://")).expanduser().resolve()) if local else url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as reason:
            raise StoreError(f"cannot open store {url}: {reason}", "give a path or an s3://, gs:// URL") from None
        self.is_local = isinstance(self._fs, LocalFileSystem)

    # -- reading ---------------------------------------------------------------------------------------------

    def manifest(self, address: str) -> Manifest | None:
        """The manifest of a committed artifact, or None. Raises `StoreError` when it is damaged."""
        try:
            text = self._fs.cat_file(f"{self._root}/{address}/{MANIFEST}").decode()
        except FileNotFoundError:
            return None
        try:
            return Manifest.from_json(text)
        except (ValueError, TypeError) as reason:
            where = f"{self.url}/{address}"
            raise StoreError(f"damaged manifest in {where}: {reason}", "remove that folder and run again") from None

    def manifests(self, stage: str | None = None) -> list[Manifest]:
        """All committed artifacts, of one stage or of all, oldest first."""
        pattern = f"{self._root}/{stage or '*'}/{'[0-9a-f]' * ADDRESS_HEX}/{MANIFEST}"
        found = [self.manifest("/".join(str(path).split("/")[-3:-1])) for path in self._fs.glob(pattern)]
        return sorted((m for m in found if m is not None), key=lambda m: (m.created, m.address))

    def path(self, address: str) -> Path:
        """A local directory with the artifact's files: the artifact itself, or a checked copy of a remote one.

        Raises `StoreError` when nothing is committed there, or when a download does not match its digests.
        """
        if self.is_local:
            directory = Path(self._root) / address
            if not (directory / MANIFEST).exists():
                raise StoreError(f"nothing is committed at {address} in {self.url}", "run sdft compress first")
            return directory
        manifest = self.manifest(address)
        if manifest is None:
            raise StoreError(f"nothing is committed at {address} in {self.url}", "run sdft compress first")
        directory = self._scratch() / "artifacts" / address
        if not (directory / MANIFEST).exists():
            self._download(manifest, directory)
        return directory

    def _download(self, manifest: Manifest, directory: Path) -> None:
        with replacing(directory) as partial:
            for name, entry in manifest.files.items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{manifest.place}/{name}", str(target))
                if file_digest(target) != entry.sha256:
                    raise StoreError(
                        f"{manifest.address}/{name} does not match its digest",
                        "`sdft verify NAME` lists the damaged folders: remove them and run again",
                    )
            partial.mkdir(parents=True, exist_ok=True)
            (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

    def damaged_files(self, address: str) -> list[str]:
        """Names of files that are missing or whose bytes differ from the manifest. Empty means sound."""
        manifest = self.manifest(address)
        if manifest is None:
            raise StoreError(f"nothing is committed at {address} in {self.url}", "`sdft ls` lists the runs")
        place = manifest.place
        return [name for name, entry in manifest.files.items() if self._digest(f"{place}/{name}") != entry.sha256]

    def _digest(self, relative: str) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self._root) / relative if self.is_local else Path(folder) / "file"
            try:
                if not self.is_local:
                    self._fs.get_file(f"{self._root}/{relative}", str(path))
                return file_digest(path)
            except FileNotFoundError:
                return None

    # -- writing ---------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises `StoreError` unless a file can be written, read back and removed."""
        probe = f"{self._root}/.probe-{uuid.uuid4().hex[:12]}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(probe, b"x")
            self._fs.rm_file(probe)
        except (OSError, ValueError) as reason:
            raise StoreError(f"store {self.url} is not writable: {reason}", "choose another with --store") from None

    def free_bytes(self) -> int | None:
        """Free bytes on the root's disk; None where the question has no answer (object stores)."""
        if not self.is_local:
            return None
        existing = next(p for p in (Path(self._root), *Path(self._root).parents) if p.exists())
        return shutil.disk_usage(existing).free

    def work(self, address: str) -> Path:
        """The stable work directory of a step: it is made when missing and kept until the commit."""
        base = Path(self._root) if self.is_local else self._scratch()
        directory = base / "work" / address
        with contextlib.suppress(FileExistsError):  # raised too when another driver removes it at this moment
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def log_path(self, name: str) -> Path:
        """Where what libraries print during the run (or study, or service) `name` is kept, on this machine."""
        base = Path(self._root) if self.is_local else self._scratch()
        return base / "logs" / f"{name.replace('/', '_')}.log"

    def url_of(self, relative: str) -> str:
        """Where something in this store lies, for fsspec."""
        return f"{self.url}/{relative}"

    def discard(self, names: Iterable[str]) -> None:
        """Remove files, given relative to the root; those that are gone already are none of our business."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

    def work_url(self, address: str) -> str:
        """Where all nodes of a cluster can write for this step (checkpoints of a training run)."""
        return f"{self.url}/work/{address}"

    @contextlib.contextmanager
    def lock(self, address: str) -> Iterator[None]:
        """Hold a step for this process, so that two runs on one machine never fill one work directory.

        Runs on several machines are kept apart by `commit`. Raises `StoreError` while another process holds the step.
        """
        lock = FileLock(self.work(address).with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"another run is computing {address} in {self.url}", "wait until it ends") from None
        try:
            yield
        finally:
            lock.release()

    def place(self, address: str, directory: Path) -> dict[str, FileEntry]:
        """Stage the files of `directory`, which is moved (local root) or uploaded; return their digests.

        The artifact does not exist until `commit`. Raises `StoreError` when it is committed already.
        """
        if self.manifest(address) is not None:
            raise StoreError(f"{address} is committed already", "artifacts are never overwritten; change the recipe")
        files = {
            path.relative_to(directory).as_posix(): FileEntry(file_digest(path), path.stat().st_size)
            for path in listed_files(directory)
        }
        if self.is_local:
            token = uuid.uuid4().hex[:12]
            incoming = self.work(address) / f"incoming-{token}"  # moving between disks takes time, and may be cut short
            shutil.move(directory, incoming)
            incoming.rename(self.work(address) / f"placed-{_folder_of(files)}-{token}")
            return files
        target = f"{self._root}/{address}/{_folder_of(files)}"
        for name in files:
            self._fs.makedirs(f"{target}/{Path(name).parent.as_posix()}", exist_ok=True)
            self._fs.put_file(str(directory / name), f"{target}/{name}")
        shutil.rmtree(directory)
        return files

    def commit(self, manifest: Manifest, superseded: Iterable[str] = ()) -> Manifest:
        """Make what `place` has staged the artifact, and drop the work directory.

        Returns the manifest that counts: this one, or that of another driver, which was first; then the files staged
        here are removed. If it is this one, `superseded` files (relative to the root) are removed.
        Raises `StoreError` when the staged files are gone and no other driver has committed.
        """
        address = manifest.address
        won = self._commit_local(manifest) if self.is_local else self._commit_remote(manifest)
        committed = self.manifest(address)
        if committed is None:
            raise StoreError(f"the files of {address} were removed from {self.url}", "run again")
        if won:
            self.discard(superseded)
        shutil.rmtree(self.work(address), ignore_errors=True)
        if not self.is_local:  # there `work` was a copy on this machine
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(f"{self._root}/work/{address}", recursive=True)
        return committed

    def _commit_local(self, manifest: Manifest) -> bool:
        target = Path(self._root) / manifest.address
        own = self.work(manifest.address) / f"commit-{uuid.uuid4().hex[:12]}"
        try:
            if not manifest.files:
                own.mkdir()
            while not own.exists():  # of equal files any will do, and another driver may take these first
                staged = self.staged(manifest.address, manifest.files)
                with contextlib.suppress(FileNotFoundError):
                    staged.rename(own)
            write_file(own / MANIFEST, manifest.to_json())
            target.parent.mkdir(parents=True, exist_ok=True)
            return _take_place(own, target)
        except (FileNotFoundError, FileExistsError):  # the driver that was first drops the work directory just now
            return False

    def _commit_remote(self, manifest: Manifest) -> bool:
        folder = _folder_of(manifest.files) if manifest.files else ""
        here = f"{self._root}/{manifest.address}"
        ours = replace(manifest, folder=folder)
        won = create(self._fs, f"{here}/{MANIFEST}", ours.to_json().encode())
        committed = self.manifest(manifest.address)
        if committed is not None and committed.folder:  # any other belongs to a driver that is late, or was killed
            self._fs.invalidate_cache()
            for path in map(str, self._fs.ls(here, detail=False)):
                if path.rstrip("/").rsplit("/", 1)[-1] not in (committed.folder, MANIFEST):
                    with contextlib.suppress(FileNotFoundError):
                        self._fs.rm(path, recursive=True)
        return won

    def staged(self, address: str, files: Mapping[str, FileEntry]) -> Path:
        """Where files that `place` has returned wait for their commit on a local root; of equal ones, the last.

        Raises `FileNotFoundError` when they are gone.
        """
        by_age: dict[int, Path] = {}
        for path in self.work(address).glob(f"placed-{_folder_of(files)}-*"):
            with contextlib.suppress(FileNotFoundError):  # another driver has just taken it
                by_age[path.stat().st_mtime_ns] = path
        if not by_age:
            raise FileNotFoundError(f"nothing is staged for {address}")
        return by_age[max(by_age)]

    def unfinished(self) -> list[str]:
        """Folders below the root with files of no artifact: their step runs now, or its driver was killed.

        Such as `work/train/0123456789abcdef` in a local store, `train/0123456789abcdef/fedcba9876543210` elsewhere.
        """
        hexes = "[0-9a-f]" * ADDRESS_HEX
        found = [f"work/{'/'.join(path.split('/')[-2:])}" for path in self._listed(f"work/*/{hexes}")]
        if self.is_local:
            return sorted(found)
        committed = {manifest.place for manifest in self.manifests()}
        staged = ("/".join(path.split("/")[-3:]) for path in self._listed(f"*/{hexes}/{hexes}"))
        return sorted([*found, *(place for place in staged if place not in committed and place[:5] != "work/")])

    def _listed(self, pattern: str) -> list[str]:
        self._fs.invalidate_cache()
        return [str(path).rstrip("/") for path in self._fs.glob(f"{self._root}/{pattern}")]

    def _write(self, relative: str, text: str) -> None:
        write_to(self._fs, f"{self._root}/{relative}", text)

    def _scratch(self) -> Path:
        """Node-local room for copies of a remote store."""
        name = self.url.replace("://", "-").replace("/", "-")
        return Path(tempfile.gettempdir()) / "sdft_ray" / f"{os.getuid()}" / name

    # -- runs ------------------------------------------------------------------------------------------------

    def write_run(self, name: str, record: dict[str, Any]) -> None:
        """Point `runs/<name>.json` at artifacts, the way a branch points at commits."""
        self._write(f"runs/{name}.json", json.dumps(record, indent=1, ensure_ascii=False))

    def run(self, name: str) -> dict[str, Any]:
        """Raises `StoreError` naming the runs there are."""
        try:
            return json.loads(self._fs.cat_file(f"{self._root}/runs/{name}.json"))
        except FileNotFoundError:
            known = ", ".join(self.runs()) or "none yet"
            raise StoreError(f"no run named {name!r} in {self.url}", f"runs here: {known}") from None

    def runs(self) -> list[str]:
        return sorted(Path(str(path)).stem for path in self._fs.glob(f"{self._root}/runs/*.json"))

    # -- studies ---------------------------------------------------------------------------------------------

    def write_study(self, name: str, file: str, data: bytes) -> str:
        """Put a file beside a study's others, in place of an earlier one; returns where it lies.

        What a study says is drawn from artifacts and can be drawn again.
        """
        write_to(self._fs, f"{self._root}/studies/{name}/{file}", data)
        return self.url_of(f"studies/{name}/{file}")

    # -- digests of what lies outside ------------------------------------------------------------------------

    def outside_digest(self, path: Path) -> str:
        """`content_digest` of a file or directory that the recipe names, remembered by size and time."""
        known = self._digest_index()
        fresh: dict[str, str] = {}

        def digest(file: Path) -> str:
            stat = file.stat()
            key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
            if key not in known:
                known[key] = fresh[key] = file_digest(file)
            return known[key]

        value = content_digest(path, digest)
        if fresh and self.is_local and Path(self._root).exists():
            with contextlib.suppress(OSError):  # a read-only store still explains
                self._write("work/digests.json", json.dumps(known, indent=0))
        return value

    def _digest_index(self) -> dict[str, str]:
        if not self.is_local:
            return {}
        try:
            return json.loads((Path(self._root) / "work/digests.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}


def _folder_of(files: Mapping[str, FileEntry]) -> str:
    """Name of the folder that files are staged in: equal files, one folder."""
    return fingerprint({name: asdict(entry) for name, entry in files.items()})[:ADDRESS_HEX]


def _take_place(staged: Path, target: Path) -> bool:
    """Rename a folder to a free address; False where an artifact lies there. Raises `FileNotFoundError`."""
    for _ in range(10):
        try:
            staged.rename(target)
            return True
        except OSError as reason:
            if reason.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if (target / MANIFEST).exists():
            return False
        # Files without a manifest: earlier versions put them there before the commit, and somebody was killed.
        aside = staged.with_name(f"abandoned-{uuid.uuid4().hex[:12]}")
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
        if (aside / MANIFEST).exists():  # committed meanwhile by another driver: back with it
            aside.rename(target)
            return False
    raise StoreError(
        f"{target} cannot be written: other runs keep writing to it", "end all other runs on this store, and run again"
    )
