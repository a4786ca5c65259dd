"""A folder of its own for the temporary files of each vLLM engine, removed with it.

vLLM puts rendezvous files (`vllm_dist_*`) and sockets into the system's temporary folder, and an engine that is killed
leaves them there. In a folder per engine they go together: when the engine is closed, or, if its process was killed,
when the next engine or session of this machine looks. A lock that only living processes hold tells which are in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PREFIX = "sdft-vllm-"
_LOCK = "lock"
_VARIABLE = "TMPDIR"


class EngineFolder:
    """The temporary folder of one engine. Start the engine inside `used`, and call `close` after its end."""

    def __init__(self) -> None:
        remove_abandoned()
        # Without the prefix until it is locked, or another process might take it for an abandoned one.
        fresh = Path(tempfile.mkdtemp(prefix="."))
        self._lock: IO[str] = (fresh / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(fresh.with_name(_PREFIX + fresh.name.lstrip(".")))
        # Also at the end of a process that never closed its engine.
        self._end = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, this process and those that it starts put temporary files here. The folder goes if that fails.

        Compiled kernels stay in the cache where the next engine finds them.
        """
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
        variable, default = os.environ.get(_VARIABLE), tempfile.tempdir
        os.environ[_VARIABLE] = tempfile.tempdir = str(self.path)
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            tempfile.tempdir = default
            os.environ.pop(_VARIABLE)
            if variable is not None:
                os.environ[_VARIABLE] = variable

    def close(self) -> None:
        """Remove the folder. Further calls do nothing."""
        self._end()


def _remove(path: Path, lock: IO[str], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of it
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


def remove_abandoned() -> None:
    """Remove the folders of engines whose processes have ended without `close`, of this user on this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, another user's, or just removed by someone else
            continue
