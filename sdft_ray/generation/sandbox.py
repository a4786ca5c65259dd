"""Runs Python code that a model wrote, together with its tests, in a restricted process. Linux only.

| what | limit |
|---|---|
| network | none: a network namespace of its own, in which even the loopback is down |
| file system | read-only, but for an empty `/tmp` in memory, of 64 MiB, the working directory; no `/proc` |
| other processes | invisible: a PID namespace of its own; every process that the code starts is killed at the end |
| privileges | no capabilities, and `no_new_privs`, also where the worker runs as root |
| environment variables | none |
| time | 5 s of CPU per process, 15 s of wall time in all |
| memory | 512 MiB of address space per process |
| files | 1 MiB per file, 32 open file descriptors per process |

What is *not* limited: the code runs under the worker's user ID, so it can read every file which that user can read, and
it can connect to Unix sockets in the file system. The number of processes has no limit, so their total memory has none
either. The result can be forged by code that searches the interpreter for the token of its run. Hence the sandbox
contains mistakes, not attackers: give workers that run code from an untrusted model a container of their own.

Where the kernel refuses one of the namespaces or mounts, nothing is run and `SandboxError` is raised.
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
FOLDER_BYTES = 64 * 2**20

Outcome = Literal["passed", "failed", "timeout"]


class SandboxError(ResourceError):
    """Code cannot be isolated on this machine."""


@dataclass(frozen=True)
class ExecResult:
    """The outcome of a run; `detail` is the last line of its standard error, or ""."""

    outcome: Outcome
    detail: str = ""


# Runs inside the new process: namespaces first, then mounts, privileges and limits. The first process of a PID
# namespace only waits, since the kernel exempts it from most signals; when it ends, all that the code started ends too.
# The token is written after the tests: code that exits early has not passed.
_CHILD = """
import ctypes, json, os, resource, signal, sys
request = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
def refuse(reason):
    os.write(3, b"refused: " + reason.encode())
    os._exit(1)
def require(result):
    if result != 0:
        refuse(os.strerror(ctypes.get_errno()))
NEWNS, NEWUSER, NEWPID, NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
uid, gid = os.getuid(), os.getgid()
if libc.unshare(NEWNS | NEWNET | NEWPID) != 0:
    require(libc.unshare(NEWUSER | NEWNS | NEWNET | NEWPID))
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:  # root without CAP_SETFCAP, for example
        refuse(str(error))
RDONLY, NOSUID_NODEV, REC, SLAVE, AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = 1, 6, 0x4000, 0x80000, -100, 0x8000, 442
require(libc.mount(None, b"/", None, ctypes.c_ulong(REC | SLAVE), None))
attributes = (ctypes.c_uint64 * 4)(RDONLY)
require(libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(32)))
require(libc.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(NOSUID_NODEV), request["folder_options"].encode()))
require(libc.mount(b"none", b"/proc", b"tmpfs", ctypes.c_ulong(NOSUID_NODEV | RDONLY), None))
os.chdir("/tmp")
NO_NEW_PRIVS, PDEATHSIG, CAPABILITIES_V3 = 38, 1, 0x20080522
require(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
require(libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_V3), (ctypes.c_uint32 * 6)()))
for _ in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    libc.prctl(PDEATHSIG, signal.SIGKILL)
for limit, value in (
    (resource.RLIMIT_CPU, request["cpu_s"]),
    (resource.RLIMIT_AS, request["memory_bytes"]),
    (resource.RLIMIT_FSIZE, request["file_bytes"]),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 32),
):
    resource.setrlimit(limit, (value, value))
def run(code, tests, token):
    names = {"__name__": "solution"}
    exec(compile(code, "solution.py", "exec"), names)
    exec(compile(tests, "tests.py", "exec"), names)
    os.write(3, token.encode())
run(request.pop("code"), request.pop("tests"), request.pop("token"))
"""
_REFUSED = "refused: "
_OUT_OF_TIME = (128 + signal.SIGXCPU, 128 + signal.SIGKILL)


def run_tests(
    code: str, tests: str, *, cpu_s: int = CPU_SECONDS, wall_s: float = WALL_SECONDS, memory_bytes: int = MEMORY_BYTES
) -> ExecResult:
    """Run `code`, then `tests` (plain asserts) in the same namespace of names.

    Raises `SandboxError` where the code cannot be isolated.
    """
    token = secrets.token_hex(16)
    request = {"code": code, "tests": tests, "token": token, "cpu_s": cpu_s, "memory_bytes": memory_bytes}
    request |= {"file_bytes": FILE_BYTES, "folder_options": f"mode=0777,size={FOLDER_BYTES}"}
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryFile() as errors,  # a file, so that RLIMIT_FSIZE bounds it too
        os.fdopen(reader, "rb") as result,
    ):
        # -I: no PYTHON* variables, no user site; -S: no site-packages.
        command = [sys.executable, "-I", "-S", "-c", f"import os; os.dup2({writer}, 3)\n{_CHILD}"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd="/",
            env={},
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        try:
            process.communicate(json.dumps(request).encode(), timeout=wall_s)
        except subprocess.TimeoutExpired:
            return ExecResult("timeout", f"more than {wall_s:g} s of wall time")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and with it the PID namespace
            process.wait()
        answer = result.read(200).decode(errors="replace")
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if answer.startswith(_REFUSED):
        raise SandboxError(
            f"code cannot be isolated: this kernel or container does not allow it ({answer.removeprefix(_REFUSED)})",
            "allow unprivileged user namespaces on the nodes that run the stage `select` (Linux 5.12 or newer), "
            "or check these rows with another answer kind",
        )
    if answer == token:
        return ExecResult("passed")
    if process.returncode in _OUT_OF_TIME:
        return ExecResult("timeout", f"more than {cpu_s} s of CPU time")
    return ExecResult("failed", lines[-1] if lines else "exited before its tests were done")


@cache
def check_sandbox() -> None:
    """Raise `SandboxError` unless this machine can isolate code. Starts one process, once (about 0.1 s)."""
    result = run_tests("import statistics", "")  # a module of many imports: the standard library must be readable
    if result.outcome != "passed":
        raise SandboxError(
            f"code cannot be run in the sandbox: {result.detail}",
            "give the processes of the stage `select` enough memory (ulimit -v), and a Python outside of /tmp",
        )
