"""What a log of a library says last: the line that a person would quote."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 256 * 2**10
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(
    r"^(\([\w ]+pid=[^)]*\)\s*)*((ERROR|WARNING|INFO|CRITICAL|FATAL)\s+[\d-]+ [\d:.,]+ \[[^\]]*\]\s?)?"
)
"""What vLLM and Ray put before a line: `(EngineCore pid=12) ERROR 11-29 07:00:00 [core.py:1000] `."""
_ERROR = re.compile(
    r"^([\w.]+\.)?\w*(Error|Exception|Interrupt|Exit)\b(: .+)?$"  # the last line of a traceback
    r"|^Fatal Python error: .+|^\*\*\* SIG\w+ received.*|^terminate called after .+|^Killed$"
)
_HOLLOW = re.compile(
    r"See root cause above|^(SystemExit|KeyboardInterrupt)|^During handling of the above|direct cause of"
)
"""Errors that speak of another one, which stands above."""


def last_words(text: str) -> str:
    """The last line of a log that names an error, without colours and prefixes, else its last line; "" for no line."""
    lines = [_PREFIX.sub("", _COLOURS.sub("", line)).rstrip() for line in text.splitlines()]
    errors = [line for line in lines if _ERROR.match(line) and not _HOLLOW.search(line)]
    return next(reversed(errors), "") or next((line.strip() for line in reversed(lines) if _says_something(line)), "")


def _says_something(line: str) -> bool:
    """Not a part of a stack trace, nor a rule of dashes."""
    return bool(re.search(r"\w", line)) and not re.match(
        r"\s|\[?\d{4}-|@|PC: |Stack \(|Current thread|Thread 0x|---", line
    )


def tail(path: Path) -> str:
    """The end of a log file, at most 256 KiB; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
