"""Harden the configuration that Ray Serve writes for HAProxy, check the result, and start HAProxy: or do not start it.

    python -I -S haproxy_config.py BINARY BIND REFUSAL -- ARGUMENTS

`ARGUMENTS` are those that Ray Serve gives to HAProxy. Every file named by `-f` is rewritten in place and read again.
If all of `PROMISES` hold in the text that was read, this process becomes `BINARY` with the same arguments. Otherwise it
exits with code 1 and writes the reason to standard error and to the file `REFUSAL`. `BIND`: address and options of the
only public listener, as in HAProxy's `bind` line.

The shell script that `haproxy.start_script` writes calls this file. It imports only the standard library, so it adds
some 30 ms to each start or reload of HAProxy.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HEADER_TIMEOUT_S = 20
"""Seconds that a client has to send the headers of a request."""

NEXT_STEP = (
    "this release of Ray writes another HAProxy configuration than sdft_ray knows: install the release of Ray that is "
    "pinned in sdft_ray's requirements"
)
_FRONT = ("frontend", "http_frontend")
_SECTIONS = frozenset({"global", "defaults", "frontend", "backend", "listen"})
_OTHER_SECTIONS = frozenset(
    {
        "acme", "aggregations", "cache", "crt-store", "fcgi-app", "http-errors", "log-forward", "log-profile",
        "mailers", "peers", "program", "resolvers", "ring", "traces", "userlist",
    }
)  # fmt: skip
"""Sections that `PROMISES` do not cover. They may be indented: HAProxy ignores indentation."""
_FLAGS = frozenset({"-db", "-dR", "-c", "-q", "-V"})
_TIMEOUT = ["timeout", "http-request", f"{HEADER_TIMEOUT_S}s"]


class Line(NamedTuple):
    """A line of a configuration: its section as (kind, name), and its words without quotes."""

    section: tuple[str, str]
    words: list[str]


def harden(text: str, bind: Sequence[str]) -> str:
    """Make the changes that `PROMISES` need, on the lines that Ray Serve 2.60 writes. Other lines stay as they are.

    Raises `ValueError` as `parse` does.
    """
    parse(text)
    result: list[str] = []
    section = ("", "")
    for line in text.rstrip("\n").split("\n"):
        words = _words(line)
        section = _section(words) or section
        if words[:1] == ["errorfile"] and words[1:2] in (["502"], ["503"], ["504"]):
            continue
        if words[:2] == _TIMEOUT[:2]:
            continue
        if words[:2] == ["stats", "socket"]:
            line = line.replace("mode 666 level admin", "mode 600 level admin")
        elif words[:1] == ["bind"] and section == _FRONT:
            line = f"    bind {shlex.join(bind)}"
        elif words[:1] == ["bind"]:
            line = re.sub(r"^(\s*bind\s+)\*?:", r"\g<1>127.0.0.1:", line)
        result.append(line)
        if section[0] == "defaults" and words[:2] == ["timeout", "client"]:
            result.append(f"    {' '.join(_TIMEOUT)}")
    return "\n".join(result) + "\n"


def parse(text: str) -> list[Line]:
    """All lines but comments. Raises `ValueError` for a line that `PROMISES` cannot judge, such as a condition."""
    lines: list[Line] = []
    section = ("", "")
    for number, raw in enumerate(text.split("\n"), 1):
        try:
            words = _words(raw)
        except ValueError as reason:
            raise ValueError(f"line {number} cannot be read ({reason})") from None
        if not words:
            continue
        is_section = not raw[:1].isspace() or words[0] in _OTHER_SECTIONS
        if words[0].startswith((".", "$")) or (is_section and words[0] not in _SECTIONS):
            raise ValueError(f"line {number} begins with {words[0]!r}, which cannot be checked")
        section = _section(words) or section
        lines.append(Line(section, words))
    return lines


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def _section(words: Sequence[str]) -> tuple[str, str] | None:
    return (words[0], " ".join(words[1:])) if words and words[0] in _SECTIONS else None


# --- promises -----------------------------------------------------------------------------------------------


def _front_listens(lines: Sequence[Line], bind: Sequence[str]) -> bool:
    return [line.words[1:] for line in lines if line.section == _FRONT and line.words[0] == "bind"] == [list(bind)]


def _others_on_loopback(lines: Sequence[Line], _: Sequence[str]) -> bool:
    places = [
        place
        for line in lines
        if line.section != _FRONT and line.words[0] in ("bind", "dgram-bind")
        for place in "".join(line.words[1:2]).split(",")
    ]
    return all(place.startswith("127.0.0.1:") for place in places)


def _admin_is_private(lines: Sequence[Line], _: Sequence[str]) -> bool:
    sockets = [line.words[2:] for line in lines if line.words[:2] == ["stats", "socket"]]
    return all(_is_private(words) for words in sockets)


def _is_private(words: Sequence[str]) -> bool:
    """Of a `stats socket`: a file, with mode 600."""
    is_file = bool(words) and words[0].startswith("/")
    return is_file and words.count("mode") == 1 and words[words.index("mode") + 1 :][:1] == ["600"]


def _errors_keep_status(lines: Sequence[Line], _: Sequence[str]) -> bool:
    replacing = [line.words for line in lines if line.words[0].startswith("error") or line.words[0] == "http-error"]
    return not any(words[0] == "errorfiles" or {"502", "503", "504"} & set(words) for words in replacing)


def _headers_have_deadline(lines: Sequence[Line], _: Sequence[str]) -> bool:
    """The timeout is in the only `defaults` section, which comes before the front and so applies to it."""
    timeouts = [line for line in lines if line.words[:2] == _TIMEOUT[:2]]
    headers = [line.section for line in lines if line.words[0] in _SECTIONS]
    defaults = [section for section in headers if section[0] == "defaults"]
    if len(defaults) != 1 or _FRONT not in headers or headers.index(defaults[0]) > headers.index(_FRONT):
        return False
    return bool(timeouts) and all(line.words == _TIMEOUT and line.section == defaults[0] for line in timeouts)


PROMISES: dict[str, Callable[[Sequence[Line], Sequence[str]], bool]] = {
    "the service listens only at the given address, with the given certificate": _front_listens,
    "all other listeners (statistics, metrics) are on 127.0.0.1": _others_on_loopback,
    "only its owner can open the admin socket": _admin_is_private,
    "errors 502 to 504 reach the client unchanged": _errors_keep_status,
    f"clients have at most {HEADER_TIMEOUT_S} s to send request headers": _headers_have_deadline,
}
"""What a hardened configuration guarantees, and the check of it: (lines, words of the public `bind`) -> bool."""


def broken_promises(text: str, bind: Sequence[str]) -> list[str]:
    """Those of `PROMISES` that do not hold in a configuration. Raises `ValueError` as `parse` does."""
    lines = parse(text)
    return [promise for promise, holds in PROMISES.items() if not holds(lines, bind)]


# --- the script ---------------------------------------------------------------------------------------------


def config_files(arguments: Iterable[str]) -> list[str]:
    """The files that HAProxy reads with these arguments. Raises `ValueError` for an unknown argument."""
    files, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-f", "-x") and rest:
            value = rest.pop(0)
            files += [value] if word == "-f" else []
        elif word in ("-sf", "-st"):  # process ids follow
            while rest and rest[0].isdigit():
                rest.pop(0)
        elif word not in _FLAGS:
            raise ValueError(f"the argument {word!r} cannot be checked")
    if not files:
        raise ValueError("no configuration file is named by -f")
    return files


def main(arguments: Sequence[str]) -> None:
    """Harden, check, and become HAProxy; see the module's docstring. Raises `SystemExit` if a promise is broken."""
    binary, bind, refusal, _, *given = arguments
    try:
        expected = shlex.split(bind)
        for path in map(Path, config_files(given)):
            hardened = harden(path.read_text(encoding="utf-8"), expected)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(hardened, encoding="utf-8")
            partial.replace(path)
            if broken := broken_promises(path.read_text(encoding="utf-8"), expected):
                raise ValueError(f"{path.name} does not guarantee that {'; nor that '.join(broken)}")
    except (OSError, ValueError) as reason:
        sys.stderr.write(f"HAProxy is not started: {reason} → {NEXT_STEP}\n")
        Path(refusal).write_text(f"{reason}\n", encoding="utf-8")
        raise SystemExit(1) from None
    os.execv(binary, [binary, *given])  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
