"""What a kill costs: runs of the stage `generate` that are killed at random, seeded points and finish all the same.

    python jobs/bench/restart.py [--quick] [--rows 20000] [--rounds 1] [--small 4] [--vllm 5]

Four things get SIGKILL: the driver with everything it started (then the same command runs again), an actor of
the pool, a worker node of a local cluster, and vLLM's engine process.

Scripted runs ask an OpenAI-compatible server outside, which answers from a script and counts every token it
gives out: `--rounds` runs of `--rows` rows for each of driver, actor and node, then `--small` runs of 2,000 rows
for each. The table must equal, byte for byte, that of a run that nobody disturbed. Runs with real vLLM rewrite
300 rows of the laboratory, with actor, engine and driver in turns. In each run every id must be there once, and
rows that were finished before the kill must not change.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs.bench.support.processes import ray_processes
from sdft_ray.generation.sampler import digest_words

BOUND_RATIO = 1.02
BOUND_ROWS_LOST = 64 + 64
"""What is in flight in an actor, and one part."""
TOKENS_PER_ROW = 8
SMALL_ROWS = 2_000
VLLM_ROWS = 300
TARGETS = ("driver", "actor", "node")
VLLM_TARGETS = ("actor", "engine", "driver")
ADDRESS = "generate/" + "6" * 16


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


def cases(arguments: argparse.Namespace) -> list[Case]:
    """All runs, each with its random point."""
    if arguments.quick:
        plan = [("server", SMALL_ROWS, "driver")]
    else:
        plan = [("server", arguments.rows, target) for _ in range(arguments.rounds) for target in TARGETS]
        plan += [("server", SMALL_ROWS, target) for _ in range(arguments.small) for target in TARGETS]
        plan += [("vllm", VLLM_ROWS, VLLM_TARGETS[n % len(VLLM_TARGETS)]) for n in range(arguments.vllm)]
    return [Case(*case, random.Random(f"{case} {number}").uniform(0.1, 0.9)) for number, case in enumerate(plan)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of 2,000 rows, the driver killed")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--small", type=int, default=4)
    parser.add_argument("--vllm", type=int, default=5)
    parser.add_argument(
        "--drive", nargs=5, metavar=("STORE", "URL", "SAMPLER", "TARGET", "ROWS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.drive:
        drive(*arguments.drive)
        return
    runs: list[dict[str, Any]] = []
    whole: dict[tuple[str, int], str] = {}
    with serving() as (server, url):
        for case in cases(arguments):
            kind = (case.sampler, case.num_rows)
            if case.sampler == "server" and kind not in whole:
                whole[kind] = run(server, url, Case(*kind, "nobody"))["digest"]
            figures = run(server, url, case)
            assert figures["digest"] == whole.get(kind, figures["digest"]), "differs from an undisturbed run"
            runs.append(figures)
            print(f"{len(runs)}: {figures}", file=sys.stderr)
    show(runs)


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
    command = [sys.executable, __file__, "--drive", str(store), url, case.sampler, case.target, str(case.num_rows)]
    # Ray tells on standard output that workers die, which is what they are here for.
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
    from jobs.bench.support.generation import farm_rows, laboratory_rows, make_job
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages import generate
    from sdft_ray.stages.session import ray_session
    from sdft_ray.store.store import Store

    part: dict[str, Any] = {"sampler": sampler, "cpus": 0.9, "max_sequences": 64}
    if sampler == "server":
        part["server"] = {"base_url": url, "model": "teacher", "max_in_flight": 64}
    resources = Resources.model_validate({"cpus": 2, "generate": part})
    rows = (farm_rows if sampler == "server" else laboratory_rows)(int(num_rows))
    with nodes() if target == "node" else ray_session(resources):
        generate.run(make_job(Store(folder), resources, rows))


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


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("sampler", "killed", "rows done then", "answers lost", "tokens / one pass", "bound", box=None)
    for run in runs:
        lost, ratio = (f"{run['rows_lost']:.0f}", f"{run['ratio']:.4f}") if "ratio" in run else ("", "")
        bound = f"{BOUND_RATIO}" if run["rows"] > SMALL_ROWS else ""
        then = f"{run['rows_done_then']:,} of {run['rows']:,}"
        table.add_row(run["sampler"], run["killed"], then, lost, ratio, bound)
    Console().print(table)
    largest = max(run["rows"] for run in runs if "ratio" in run)
    ratios = [run["ratio"] for run in runs if run["rows"] == largest]
    result = {
        "bench": "restart",
        "rows": largest,
        "ratio": max(ratios),
        "median_ratio": statistics.median(ratios),
        "bound_ratio": BOUND_RATIO,
        "rows_lost": max(run["rows_lost"] for run in runs if "ratio" in run),
        "bound_rows_lost": BOUND_ROWS_LOST,
        "num_runs": len(runs),
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
