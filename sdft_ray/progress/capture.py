"""A terminal for our own words: what libraries write meanwhile goes to a log file.

Ray and vLLM write from C++ and from threads, to the file descriptors and past Python's `logging`, so that no log level
silences them. The descriptors themselves therefore lead to the log file for a while.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

_MAX_BYTES = 16 * 2**20
"""A log that is larger than this is begun anew."""
_STREAMS = {1: "stdout", 2: "stderr"}

_lock = threading.Lock()
_open: list[_Capture] = []
"""The capture that is under way, if any."""


@dataclass(frozen=True)
class Terminal:
    """Where standard output and standard error led before, and the file to which they lead now."""

    out: IO[str]
    err: IO[str]
    log: Path


@contextlib.contextmanager
def libraries_to(log: Path) -> Iterator[Terminal]:
    """Within, this process and those that it starts write to `log` what they write to standard output or error.

    The streams of the `Terminal` still lead where these led before. Inside of another such block, also one of another
    thread, the outer one's log goes on. A stream that is not the process's own (a notebook's, a test's) stays as it is.
    """
    with _lock:
        is_outer = not _open
        if is_outer:
            _open.append(_Capture(log))
        capture = _open[0]
    try:
        yield capture.terminal
    finally:
        if is_outer:
            with _lock:
                _open.clear()
                capture.end()


class _Capture:
    """Two descriptors that lead to a log file until `end`."""

    def __init__(self, log: Path) -> None:
        opened = _opened(log)
        self._copies = {fd: copy for fd in _STREAMS if (copy := _duplicate(fd)) is not None}
        self._own = {fd: os.fdopen(os.dup(copy), "w", **how) for fd, copy in self._copies.items() if (how := _own(fd))}
        out, err = (self._own[fd] if fd in self._own else getattr(sys, name) for fd, name in _STREAMS.items())
        self.terminal = Terminal(out, err, log)
        _flush()
        for fd in self._copies:
            os.dup2(opened, fd)
        os.close(opened)

    def end(self) -> None:
        """Let the descriptors lead where they led before."""
        _flush()  # what Python holds back belongs to the log
        for stream in self._own.values():
            stream.close()
        for fd, copy in self._copies.items():
            os.dup2(copy, fd)
            os.close(copy)


def short(path: Path) -> str:
    """Relative to the current directory if it is inside it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray may delete a job's folder while it runs
        return str(path)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _duplicate(fd: int) -> int | None:
    """Another descriptor of the same file; None where a service has closed this one."""
    with contextlib.suppress(OSError):
        return os.dup(fd)
    return None


def _own(fd: int) -> dict[str, Any]:
    """How Python writes to the descriptor; empty where its standard stream is another, such as a notebook's."""
    stream = getattr(sys, _STREAMS[fd])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream.fileno() == fd:
            return {"encoding": stream.encoding, "errors": stream.errors, "buffering": 1}
    return {}


def _flush() -> None:
    for name in _STREAMS.values():
        if (stream := getattr(sys, name)) is not None:
            stream.flush()


def _opened(log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _MAX_BYTES:
        log.unlink()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(opened, f"--- {datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()}\n".encode())
    return opened
