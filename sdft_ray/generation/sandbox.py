"""Python code from a model, run against tests in a process that can hurt nobody.

The process has no network (a network namespace of its own), bounded processor time, wall time, memory and file
size, an empty environment, and a folder of its own that is removed afterwards. It is Linux only, and where the
kernel refuses the namespace nothing is run: `SandboxError` says so. It keeps honest mistakes and careless code
in; it is no jail for an attacker, who could still read what this user can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sdft_ray.errors import ResourceError

CPU_SECONDS = 5
WALL_SECONDS = 15.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20

Outcome = Literal["passed", "failed", "timeout"]


class SandboxError(ResourceError):
    """Code cannot be isolated on this machine."""


@dataclass(frozen=True)
class Ran:
    """What became of the code; `detail` is the last line of its complaint, or ""."""

    outcome: Outcome
    detail: str = ""


# Runs inside. It shuts the doors first: networks and processes of its own, then limits. The first process of the
# namespace only waits, since the kernel spares first processes most signals; when it ends, whatever the code
# started ends with it. The token that it was given is written after the tests: code that exits early has not passed.
_CHILD = """
import ctypes, json, os, resource, signal, sys
given = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
NEWUSER, NEWPID, NEWNET, PDEATHSIG = 0x10000000, 0x20000000, 0x40000000, 1
if libc.unshare(NEWNET | NEWPID) != 0 and libc.unshare(NEWUSER | NEWNET | NEWPID) != 0:
    os.write(3, b"no namespace")
    os._exit(1)
for _ in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    libc.prctl(PDEATHSIG, signal.SIGKILL)
for limit, value in (
    (resource.RLIMIT_CPU, given["cpu_s"]),
    (resource.RLIMIT_AS, given["memory_bytes"]),
    (resource.RLIMIT_FSIZE, given["file_bytes"]),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 32),
):
    resource.setrlimit(limit, (value, value))
def run(code, tests, token):
    names = {"__name__": "solution"}
    exec(compile(code, "solution.py", "exec"), names)
    exec(compile(tests, "tests.py", "exec"), names)
    os.write(3, token.encode())
run(given.pop("code"), given.pop("tests"), given.pop("token"))
"""
_OUT_OF_TIME = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


def run_tests(
    code: str, tests: str, *, cpu_s: int = CPU_SECONDS, wall_s: float = WALL_SECONDS, memory_bytes: int = MEMORY_BYTES
) -> Ran:
    """Run `code`, then `tests` (plain asserts) in its names. Raises `SandboxError` where it cannot be isolated."""
    token = secrets.token_hex(16)
    given = {"code": code, "tests": tests, "token": token}
    given |= {"cpu_s": cpu_s, "memory_bytes": memory_bytes, "file_bytes": FILE_BYTES}
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as complaints,  # a file, so that its size is bounded too
        os.fdopen(reader, "rb") as answer,
    ):
        # -I: no PYTHON* variables, no user site; -S: none of our packages either.
        command = [sys.executable, "-I", "-S", "-c", f"import os; os.dup2({writer}, 3)\n{_CHILD}"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            cwd=folder,
            env={},
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        try:
            process.communicate(json.dumps(given).encode(), timeout=wall_s)
        except subprocess.TimeoutExpired:
            return Ran("timeout", "no end in sight")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started
            process.wait()
        said = answer.read(64).decode(errors="replace")
        complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 2000))
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    if said == "no namespace":
        raise SandboxError(
            "this kernel lets no unprivileged process have a network of its own, so code cannot be isolated",
            "allow user namespaces on the machines that run `select`, or check these rows with another answer kind",
        )
    if said == token:
        return Ran("passed")
    if process.returncode in _OUT_OF_TIME:
        return Ran("timeout", f"more than {cpu_s} s of processor time")
    return Ran("failed", lines[-1] if lines else "left before its tests were done")


@cache
def check_sandbox() -> None:
    """Raises `SandboxError` unless this machine can isolate code."""
    ran = run_tests("", "")
    if ran.outcome != "passed":
        raise SandboxError(f"code cannot be run apart: {ran.detail}", "check memory limits of this process")
