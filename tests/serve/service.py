"""The service as a user starts it: `sdft serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from sdft_ray.serving.haproxy import free_ports
from tests.support.processes import ray_processes

START_S = 480


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def family(self, named: str) -> list[psutil.Process]:
        """Its processes whose command has that in it."""
        return ray_processes(named, self.process.pid)


@contextmanager
def serving(folder: Path, *arguments: str | Path, trusted: ssl.SSLContext | None = None) -> Iterator[Running]:
    """Start `sdft serve`, wait until it is ready, and end it as Ctrl-C does. `trusted`: it speaks TLS."""
    (port,) = free_ports(1)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "sdft_ray.cli", "serve", *map(str, arguments), "--port", str(port)]
    environment = {**os.environ, "HOME": str(folder), "COLUMNS": "200"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment
        )
    url = f"https://localhost:{port}" if trusted else f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while "Ready at" not in log.read_text(encoding="utf-8"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        assert httpx.get(f"{url}/readyz", verify=trusted or True).text == "ready"
        yield Running(url, process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@dataclass(frozen=True)
class Attempt:
    """One request: when it began and ended, and its status; "refused" or "broken" without one."""

    began: float
    ended: float
    outcome: int | str


@dataclass
class Crowd:
    """Clients who ask again and again, while the context lasts."""

    url: str
    body: dict[str, Any]
    clients: int
    headers: dict[str, str] = field(default_factory=dict)
    trusted: ssl.SSLContext | None = None
    asked: list[Attempt] = field(default_factory=list)

    def __enter__(self) -> Crowd:
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()

    def outcomes(self, since: float = 0.0) -> set[int | str]:
        """Of requests that began at `since` or later."""
        return {each.outcome for each in list(self.asked) if each.began >= since}

    def wait_for(self, num: int, outcome: int | str = 200, *, timeout_s: float = 240.0) -> None:
        """Until so many more have ended so."""
        begun = time.monotonic()
        while sum(each.outcome == outcome and each.began > begun for each in list(self.asked)) < num:
            assert time.monotonic() < begun + timeout_s, self.asked[-20:]
            time.sleep(0.1)

    def _ask(self) -> None:
        with httpx.Client(headers=self.headers, verify=self.trusted or True, timeout=300) as client:
            while not self._leaving.is_set():
                began, outcome = time.monotonic(), "broken"
                try:
                    answer = client.post(f"{self.url}/v1/completions", json=self.body)
                    whole = "stream" not in self.body or b"[DONE]" in answer.content
                    outcome = answer.status_code if whole or answer.status_code != 200 else "broken"
                except httpx.ConnectError:
                    outcome = "refused"
                except httpx.HTTPError:
                    pass
                self.asked.append(Attempt(began, time.monotonic(), outcome))
                if outcome != 200:
                    self._leaving.wait(0.1)
