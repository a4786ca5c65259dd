"""What killed a process, read from what it and its parents wrote, and what that most likely means.

words = killed(str(error) + log_text, log=path)
# ("killed by SIGILL: this CPU does not have an instruction that ...", "set dtype: float32 ...; its log is PATH")
"""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from pathlib import Path

OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
)
"""What CUDA, PyTorch's allocators, the C library, C++ and cuBLAS say."""
RAY_SAYS_LOW = "node running low on memory"
"""In every error about a worker that Ray's memory monitor ended."""
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
