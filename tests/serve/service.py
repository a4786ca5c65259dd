"""The service as a user starts it: `sdft serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from sdft_ray.serving.front import free_ports

START_S = 480


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    url: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def serving(folder: Path, *arguments: str | Path, secret: str | None = None) -> Iterator[Running]:
    """Start `sdft serve`, wait until it is ready, and end it as Ctrl-C does."""
    (port,) = free_ports(1)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "sdft_ray.cli", "serve", *map(str, arguments), "--port", str(port)]
    environment = {**os.environ, "HOME": str(folder), "COLUMNS": "200"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while "Ready at" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        assert httpx.get(f"{url}/readyz").text == "ready"
        yield Running(url, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
