"""The sandbox for code: one test for each limit that its docstring promises, and for what the caller gets to know."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdft_ray.generation.sandbox import SandboxError, check_sandbox, run_tests

REFUSED = {
    "network": ("import socket; socket.create_connection(('127.0.0.1', 9), timeout=2)", "Network is unreachable"),
    "memory": ("x = bytearray(10**9)", "MemoryError"),
    "file": ("open('f', 'wb').write(b'x' * 10**7)", "File too large"),
    "all files": ("for n in range(80): open(f'f{n}', 'wb').write(b'x' * 2**20)", "No space left on device"),
    "descriptors": ("files = [open('/dev/null') for _ in range(40)]", "Too many open files"),
    "other processes": ("import os; os.kill(DRIVER, 0)", "ProcessLookupError"),
    "proc": ("open('/proc/DRIVER/environ')", "FileNotFoundError"),
    "remount": ("import ctypes; assert ctypes.CDLL(None).umount2(b'/proc', 2) == 0, 'still there'", "still there"),
    "capabilities": ("import os; os.chroot('/usr')", "PermissionError"),
    "exit": ("import sys; sys.exit(0)", "before its tests were done"),
    "forged": ("import os; os.write(3, b'passed' * 9); os._exit(0)", "before its tests were done"),
}
BECOME_ORDINARY_USER = """
import ctypes, os
libc = ctypes.CDLL(None)
uid, gid = os.getuid(), os.getgid()
assert libc.unshare(0x10000000) == 0  # a user namespace, in which this user has the ID 1000
for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
BEFORE
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()) == 0
from sdft_ray.generation.sandbox import run_tests
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_code_is_limited(case: str) -> None:
    code, detail = REFUSED[case]
    result = run_tests(code.replace("DRIVER", str(os.getpid())), "")
    assert result.outcome == "failed"
    assert detail in result.detail


@pytest.fixture
def beside_tmp() -> Iterator[Path]:
    """A folder that an empty /tmp does not hide."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_nothing_outside_can_be_changed(tmp_path: Path, beside_tmp: Path) -> None:
    """By the same user, beside /tmp as well as below it; /tmp is empty, writable and gone afterwards."""
    visible, hidden = beside_tmp / "f", tmp_path / "f"
    for path in (visible, hidden):
        path.write_text("before")
    code = "import os\nassert os.getcwd() == '/tmp' and not os.listdir()\nopen('sdft-own', 'w').write('x')"
    assert run_tests(code, f"assert not os.path.exists({str(hidden)!r})").outcome == "passed"
    for action in (f"open({str(visible)!r}, 'w')", f"os.remove({str(visible)!r})"):
        assert "Read-only file system" in run_tests(f"import os; {action}", "").detail
    assert [path.read_text() for path in (visible, hidden)] == ["before", "before"]
    assert not Path("/tmp/sdft-own").exists()


def test_the_environment_does_not_reach_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run_tests("", "import os; assert not os.environ.get('SECRET')").outcome == "passed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "wall_s", "detail"),
    [("while True: pass", 30, "1 s of CPU time"), ("import time; time.sleep(60)", 2, "2 s of wall time")],
)
def test_code_that_does_not_end_is_stopped(code: str, wall_s: float, detail: str) -> None:
    result = run_tests(code, "", cpu_s=1, wall_s=wall_s)
    assert (result.outcome, result.detail) == ("timeout", f"more than {detail}")


OUTLIVE = """
import psutil
from sdft_ray.generation.sandbox import run_tests
code = "import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n    time.sleep(7654.25)"
assert run_tests(code, "pass").outcome == "passed"
print([child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE])
"""


def test_nothing_outlives_the_sandbox() -> None:
    """In a process of its own, which has no other children."""
    done = subprocess.run([sys.executable, "-c", OUTLIVE], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_user_without_privileges_gets_the_same_limits() -> None:
    """User namespaces in place of capabilities; the file system is read-only and `/tmp` writable all the same."""
    code = "open('own', 'w').write('x')\ntry: open('/var/x', 'w')\nexcept OSError as error: reason = error"
    assert "outcome='passed'" in _as_ordinary_user(f"print(run_tests({code!r}, 'assert reason.errno == 30, reason'))")


def test_a_kernel_that_refuses_a_namespace_is_named() -> None:
    script = 'try: run_tests("", "")\nexcept ValueError as error: print(type(error).__name__, error)'
    output = _as_ordinary_user(script, before='open("/proc/sys/user/max_user_namespaces", "w").write("0")')
    assert output.startswith(f"{SandboxError.__name__} code cannot be isolated")
    assert "allow unprivileged user namespaces" in output


def _as_ordinary_user(script: str, before: str = "") -> str:
    """Standard output of a process without capabilities; `before` runs before it loses those of its namespace."""
    command = [sys.executable, "-c", BECOME_ORDINARY_USER.replace("BEFORE", before) + script]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_check_of_the_machine_is_cheap() -> None:
    check_sandbox()
    start = time.perf_counter()
    for _ in range(100):
        check_sandbox()
    assert time.perf_counter() - start < 0.1


def test_unix_sockets_are_not_closed(beside_tmp: Path) -> None:
    """The docstring says so: what is not limited is as true as what is."""
    path = beside_tmp / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
        assert run_tests(code, "").outcome == "passed"
