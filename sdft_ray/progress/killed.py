"""What killed a process, read from what it and its parents wrote, and what that most likely means.

words = killed(str(error) + log_text, log=path)
# ("killed by SIGILL: this CPU does not have an instruction that ...", "set dtype: float32 ...; its log is PATH")
"""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from pathlib import Path

_TAIL_BYTES = 2**16
_NEWEST = 20
"""Logs that are looked at."""
RAY_LOGS = Path("/tmp/ray/session_latest/logs")  # noqa: S108  (where Ray puts them)
_GONE = "died unexpectedly"
"""In every error of Ray about a process that is gone."""
_NO_TRACE = "End of file"
_RECENT_S = 600.0
_SAID = {
    "Illegal instruction": signal.SIGILL,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "Aborted": signal.SIGABRT,
    "Floating-point exception": signal.SIGFPE,
}
"""What Python's `faulthandler`, which Ray enables in its workers, calls a signal."""
_MEANS = {
    "SIGILL": (
        "this CPU does not support an instruction that the engine uses, most likely for bfloat16",
        "set dtype: float32 (`sdft serve --dtype float32`; `generate.dtype` and `evaluate.dtype` in the resources)",
    ),
    "SIGKILL": (
        "most likely the machine ran out of memory",
        "use fewer or smaller workers, or a machine with more memory",
    ),
    "SIGTERM": ("someone ended it", "run the same command again"),
    "SIGBUS": ("most likely /dev/shm or the disk is full", "free some space and run again"),
}
_CRASH = ("native code crashed", "run again; if it happens again, report it with the log")


def killed(said: str, log: str | Path = "") -> tuple[str, str] | None:
    """What killed the process whose errors and exit codes are in `said`, and the next step; None if nothing tells.

    `log` is named in the next step as the file to look at.
    """
    found = signal_in(said)
    return None if found is None else signal_words(found, log)


def worker_death(said: str, logs: Path = RAY_LOGS) -> tuple[str, str] | None:
    """`killed` for a Ray worker, of which Ray's error `said` only that it died; `logs` is Ray's folder of logs.

    SIGKILL leaves no trace but a connection that ends: the kernel sends it where memory runs out.
    """
    if _GONE not in said:
        return killed(said, logs)
    log = worker_log(said, logs)
    if words := killed(f"{said}\n{tail(log)}" if log else said, log or logs):
        return words
    return signal_words(signal.SIGKILL, log or logs) if _NO_TRACE in said else None


def signal_words(found: signal.Signals, log: str | Path = "") -> tuple[str, str]:
    """What a signal most likely means, and the next step."""
    means, step = _MEANS.get(found.name, _CRASH)
    return f"killed by {found.name}: {means}", f"{step}; its log is {log}" if log else step


def signal_in(said: str) -> signal.Signals | None:
    """The signal that a text names as the end of a process.

    Known are Python's and Ray's own words, and exit codes below 0 as Python and vLLM write them.
    """
    for words, found in _SAID.items():
        if f"Fatal Python error: {words}" in said:
            return found
    if named := re.search(r"\*\*\* (SIG[A-Z]+) received", said):
        with suppress(KeyError):
            return signal.Signals[named[1]]
    if code := re.search(r"(?:exit ?code|exit status|core proc\(s\))[^\n]{0,80}?[\s:={]-(\d{1,2})\b", said):
        with suppress(ValueError):
            return signal.Signals(int(code[1]))
    return None


def worker_log(said: str, logs: Path) -> Path | None:
    """The log of the Ray worker that an error of Ray is about, by its process id, in Ray's folder of logs.

    Without an id it is the newest log of the last ten minutes that names a signal. None where there is none, such as on
    another node.
    """
    for pid in re.findall(r"\bpid[:=]\s*(\d+)", said):
        for path in logs.glob(f"worker-*-{pid}.err"):
            return path
    age_s = {path: time.time() - path.stat().st_mtime for path in logs.glob("worker-*.err")}
    recent = sorted((path for path in age_s if age_s[path] < _RECENT_S), key=lambda path: age_s[path])
    return next((path for path in recent[:_NEWEST] if signal_in(tail(path))), None)


def tail(path: Path) -> str:
    """The end of a log; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
