"""Starts Ray's workers by fork, from a process that has imported torch and transformers once.

A worker in a test computes for a moment, after importing for eight seconds, and a test process starts hundreds of them.
Forked ones run the same code on the same Ray: only their modules come from memory. The quickstart, services, and tests
that do not ask for it start workers as Ray always does.

Ray starts a worker with `sys.executable`. For a driver that uses the server this is a stub, which hands command,
environment and standard streams over and ends when the fork ends; if the stub is killed, so is the fork.
`python -m tests...` with the stub is forked as well; anything else that is started with it runs in plain Python.
Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

PRELOADED = (
    "torch.distributed", "torch._dynamo", "scipy.stats", "pandas", "pyarrow.parquet", "datasets", "peft",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "lm_eval.tasks", "lm_eval.evaluator", "sdft_ray.evaluation.harness", "sdft_ray.training.loop",
    "sdft_ray.generation.transformers_sampler",
)  # fmt: skip
"""Not Ray itself, which reads its environment when it is imported: the raylet tells a worker there who it is."""

# Isolated and without `site`: it starts in some 20 ms.
_STUB = """\
#!{python} -ISE
import json, os, socket, sys

arguments = sys.argv[1:]
of_tests = arguments[:1] == ["-m"] and arguments[1].startswith("tests.")
if not of_tests and not any(argument.endswith("default_worker.py") for argument in arguments[:2]):
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
os._exit((server.recv(1) or b"\\1")[0])
"""


@dataclass(frozen=True)
class ForkServer:
    """A running server; its folder holds socket, stub and log."""

    folder: Path

    @property
    def python(self) -> str:
        """The stub."""
        return str(self.folder / "python")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Raylets that this process starts meanwhile fork their workers."""
        with patch.object(sys, "executable", self.python):
            yield

    def environment(self) -> dict[str, str]:
        """For a driver in a process of its own."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="sdft_ray_forks_") as temporary:
        folder = Path(temporary)
        python, stub = sys.executable, folder / "python"
        stub.write_text(_STUB.format(python=python, address=str(folder / "socket")), encoding="utf-8")
        stub.chmod(0o755)
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(stub)!r}\n", encoding="utf-8")
        command = [python, "-m", __name__, str(folder / "socket")]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        with process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError((folder / "log").read_text(encoding="utf-8"))
            try:
                yield ForkServer(folder)
            finally:
                process.terminate()


def serve(address: str) -> None:
    """Fork a worker for every stub that connects, until standard input is closed."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    print("ready", flush=True)
    forks: dict[int, tuple[socket.socket, int]] = {}  # process -> its stub, and a descriptor that tells of its end
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                stub = listener.accept()[0]
                pid = _fork(stub, selector)
                if pid is None:
                    stub.close()
                    continue
                forks[pid] = stub, os.pidfd_open(pid)
                for source in forks[pid]:
                    selector.register(source, selectors.EVENT_READ, pid)
            elif key.data is None:
                return
            elif key.data in forks:
                _reap(key.data, *forks.pop(key.data), key.fd, selector)


def _reap(pid: int, stub: socket.socket, ended: int, told_by: int, selector: selectors.BaseSelector) -> None:
    """One of fork and stub has ended; the other follows."""
    if told_by != ended:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for source in (ended, stub):
        selector.unregister(source)
    with contextlib.suppress(OSError):
        stub.sendall(bytes([code & 0xFF]))
    stub.close()
    os.close(ended)


def _fork(stub: socket.socket, selector: selectors.BaseSelector) -> int | None:
    """The process of the fork, in the server; the fork does not return. None if the stub was killed as it asked."""
    header, streams, _, _ = socket.recv_fds(stub, 8, 3)
    with stub.makefile("rb") as body:
        text = body.read(size := int.from_bytes(header, "big"))
    if not size or len(text) < size:
        for stream in streams:
            os.close(stream)
        return None
    request = json.loads(text)
    pid = os.fork()
    if pid == 0:
        for key in list(selector.get_map().values()):
            if key.fd > 2:
                os.close(key.fd)
        selector.close()
        stub.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    if pid == 0:
        _become(*request)
    return pid


def _become(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run a module of the tests, or a worker as Ray's `setup_worker.py` does, without another start of Python."""
    context = "{}"
    command = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = value
        elif name != "--language" and not name.endswith("setup_worker.py"):
            command.append(argument)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(json.loads(context).get("env_vars") or {})
    code = 1
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  (the end of a process)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
