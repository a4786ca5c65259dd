"""Runs of the stage `generate` that are killed while they work and must complete all the same.

`run` executes one `Case` in a driver process of its own (`python -m tests.support.killed_generation`), kills the target
when a share of the rows is finished, and checks the table: every id once, finished rows unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.generation.sampler import digest_words
from tests.support.processes import ray_processes

ADDRESS = "generate/" + "6" * 16
TOKENS_PER_ROW = 8


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


@dataclass(frozen=True)
class Case:
    """One run: how many rows, who samples, who is killed and at which share of the rows."""

    sampler: str
    num_rows: int
    target: str
    point: float = 0.0


def run(server: Server, url: str, case: Case) -> dict[str, Any]:
    """Run a case to its end; its figures, and the digest of its table."""
    before = server.num_tokens
    killed_at = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        finished: dict[bytes, str] = {}
        with driving(store, url, case) as driver:
            if case.target != "nobody":
                killed_at = wait_for_rows(store, round(case.point * case.num_rows), driver)
                kill(driver, case.target)
                finished = finished_rows(store)
            failed = driver.wait()
        if failed:
            assert case.target == "driver", "the driver failed"
            with driving(store, url, case) as driver:
                assert driver.wait() == 0
        path = store / ADDRESS / "generated.parquet"
        check(pq.read_table(path), case, finished)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    figures = {"sampler": case.sampler, "rows": case.num_rows, "killed": case.target, "rows_done_then": killed_at}
    if case.sampler == "server":
        asked = (server.num_tokens - before) / TOKENS_PER_ROW
        figures |= {"ratio": asked / case.num_rows, "rows_lost": asked - case.num_rows}
    return {**figures, "rows_kept": len(finished), "digest": digest}


def check(table: pa.Table, case: Case, finished: dict[bytes, str]) -> None:
    """Every row once, and those that were finished as they were."""
    rows = dict(zip(table["row_key"].to_pylist(), table["response"].to_pylist(), strict=True))
    assert table.num_rows == len(rows) == len(set(table["example_id"].to_pylist())) == case.num_rows
    changed = [key for key, text in finished.items() if rows[key] != text]
    assert not changed, f"{len(changed)} finished rows changed"


def finished_rows(store: Path) -> dict[bytes, str]:
    """Row key -> response of all rows that lie in the row cache."""
    found: dict[bytes, str] = {}
    for part in store.glob("rows/*/*/*.parquet"):
        table = pq.read_table(part)
        found.update(zip(table["row_key"].to_pylist(), table["response"].to_pylist(), strict=True))
    return found


@contextmanager
def driving(store: Path, url: str, case: Case) -> Iterator[subprocess.Popen[bytes]]:
    """The driver of a run, in a process that does not outlive the block."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    if case.target == "engine":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    command = [sys.executable, "-m", "tests.support.killed_generation"]
    command += [str(store), url, case.sampler, case.target, str(case.num_rows)]
    # Ray reports the death of workers on standard output; here it is intended.
    driver = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def wait_for_rows(store: Path, wanted: int, driver: subprocess.Popen[bytes]) -> int:
    """Until the stage has said that `wanted` rows are done."""
    log = store / "work" / ADDRESS / "progress.jsonl"
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
    name = "EngineCore" if target == "engine" else "MapWorker"
    victim = ray_processes(name, driver.pid)[0]
    if target == "node":
        victim = victim.parent() or victim
        assert "raylet" in " ".join(victim.cmdline())
    os.kill(victim.pid, signal.SIGKILL)


def drive(folder: str, url: str, sampler: str, target: str, num_rows: str) -> None:
    """The driver: one actor, on a cluster of three nodes where a node is to die."""
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages import generate
    from sdft_ray.stages.session import ray_session
    from sdft_ray.store.store import Store
    from tests.support.generation_job import farm_rows, laboratory_rows, make_job
    from tests.support.staged import commit_output

    part: dict[str, Any] = {"sampler": sampler, "cpus": 0.9, "max_sequences": 64}
    if sampler == "server":
        part["server"] = {"base_url": url, "model": "teacher", "max_in_flight": 64}
    resources = Resources.model_validate({"cpus": 2, "generate": part})
    rows = (farm_rows if sampler == "server" else laboratory_rows)(int(num_rows))
    job = make_job(Store(folder), resources, rows)
    with nodes() if target == "node" else ray_session(resources):
        result = generate.run(job)
    commit_output(job, result)


@contextmanager
def nodes() -> Iterator[None]:
    """A head that runs no actors, and two nodes that do."""
    import ray
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=memory)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    drive(*sys.argv[1:])
