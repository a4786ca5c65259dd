"""What a kill costs: tokens that a teacher writes over a run that is killed and continued, against one pass.

    python jobs/bench/restart.py [--quick] [--rows 20000] [--rounds 3]

The witness stands outside: an OpenAI-compatible server that answers from a script and counts every token it
gives out. The stage `generate` asks it from a driver in a process of its own. At a random, seeded point the
driver, with everything it started, or one actor of its pool gets SIGKILL; a killed driver is started again. In the
end every row must be there once, and the table equal byte for byte to that of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from sdft_ray.generation.sampler import digest_words

BOUND_RATIO = 1.02
TOKENS_PER_ROW = 8
TARGETS = ("driver", "actor")


class Server:
    """Chat completions from `digest_words`, each after a moment, and a count of the tokens given out."""

    def __init__(self, delay_s: float = 0.02) -> None:
        from fastapi import FastAPI

        self.num_tokens = 0
        self.app = FastAPI()
        self._delay_s = delay_s
        self.app.post("/v1/chat/completions")(self.answer)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = digest_words(body["messages"][-1]["content"])
        self.num_tokens += TOKENS_PER_ROW
        await asyncio.sleep(self._delay_s)
        message = {"role": "assistant", "content": text}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 50, "completion_tokens": TOKENS_PER_ROW, "total_tokens": 58},
        }


@contextmanager
def serving() -> Iterator[tuple[Server, str]]:
    """The server on a free port of the loopback, in a thread."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server()
    options: dict[str, Any] = {"log_level": "error", "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(server.app, host="127.0.0.1", port=port, **options)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.05)
        yield server, f"http://127.0.0.1:{port}/v1"
    finally:
        running.should_exit = True
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 2,000 rows, the driver killed")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drive", nargs=2, metavar=("STORE", "URL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        store, url = arguments.drive
        drive(store, url, arguments.rows)
        return
    num_rows, rounds = (2_000, 1) if arguments.quick else (arguments.rows, arguments.rounds)
    targets = TARGETS[:1] if arguments.quick else TARGETS
    runs: dict[str, list[dict[str, float]]] = {target: [] for target in targets}
    with serving() as (server, url):
        whole, _ = one_run(server, url, num_rows, None, 0.0)
        for number in range(rounds):
            for target in targets:
                point = random.Random(f"{target} {number}").uniform(0.1, 0.9)
                digest, figures = one_run(server, url, num_rows, target, point)
                assert digest == whole, "the table differs from that of an undisturbed run"
                runs[target].append(figures)
    show(runs, num_rows)


def one_run(server: Server, url: str, num_rows: int, target: str | None, point: float) -> tuple[str, dict[str, float]]:
    """Run until it is done, with one kill at the share `point` of its rows; digest of the table, and the figures."""
    before = server.num_tokens
    with tempfile.TemporaryDirectory() as store:
        driver = start(store, url, num_rows)
        killed_at = 0
        if target is not None:
            killed_at = wait_for_rows(Path(store), round(point * num_rows), driver)
            kill(driver, target)
        if driver.wait() != 0:
            assert target == "driver", "the driver failed"
            driver = start(store, url, num_rows)
            assert driver.wait() == 0
        table = (Path(store) / f"generate/{'6' * 16}/generated.parquet").read_bytes()
    tokens = server.num_tokens - before
    figures = {"killed_at": killed_at, "ratio": tokens / (num_rows * TOKENS_PER_ROW)}
    return hashlib.sha256(table).hexdigest(), figures


def start(store: str, url: str, num_rows: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OPENAI_LOG": ""}
    command = [sys.executable, __file__, "--rows", str(num_rows), "--drive", store, url]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait_for_rows(store: Path, wanted: int, driver: subprocess.Popen[bytes]) -> int:
    """Until the stage has said that `wanted` rows are done."""
    log = store / f"work/generate/{'6' * 16}/progress.jsonl"
    while driver.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        done = json.loads(lines[-1])["rows_done"] if lines else 0
        if done >= wanted:
            return done
        time.sleep(0.05)
    raise AssertionError("the run ended before the kill")


def kill(driver: subprocess.Popen[bytes], target: str) -> None:
    if target == "driver":
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        psutil.wait_procs(children, timeout=60)  # Ray's processes leave when their driver is gone
        return
    actors = [p for p in psutil.Process(driver.pid).children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
    os.kill(actors[0].pid, signal.SIGKILL)


def drive(folder: str, url: str, num_rows: int) -> None:
    """The driver: one actor that asks the server."""
    from jobs.bench.support.generation import farm_rows, make_job
    from sdft_ray.resources import Resources
    from sdft_ray.stages import generate
    from sdft_ray.stages.session import ray_session
    from sdft_ray.store.store import Store

    server = {"base_url": url, "model": "teacher", "max_in_flight": 64}
    part = {"sampler": "server", "server": server, "cpus": 0.9, "max_sequences": 64}
    resources = Resources.model_validate({"cpus": 2, "generate": part})
    store = Store(folder)
    with ray_session(resources):
        generate.run(make_job(store, resources, farm_rows(num_rows)))


def show(runs: dict[str, list[dict[str, float]]], num_rows: int) -> None:
    table = Table("killed", "rows done then", "tokens / one pass", "bound", box=None)
    for target, values in runs.items():
        for figures in values:
            ratio, then = f"{figures['ratio']:.4f}", f"{figures['killed_at']:,} of {num_rows:,}"
            table.add_row(target, then, ratio, f"{BOUND_RATIO}")
    Console().print(table)
    ratios = [figures["ratio"] for values in runs.values() for figures in values]
    result = {"bench": "restart", "rows": num_rows, "ratio": max(ratios), "bound_ratio": BOUND_RATIO}
    print(json.dumps({**result, "median_ratio": statistics.median(ratios), "runs": runs}))


if __name__ == "__main__":
    main()
