"""The service against vLLM's own OpenAI server; then a crowd of clients, and a killed replica.

    python jobs/bench/serve.py [--quick] [--rounds 5] [--seconds 8] [--crowd 1000] [--crowd-seconds 60]

Both serve the laboratory's teacher with the same engine arguments on the same cores, each in processes of its own.
They take turns: while one is asked, all processes of the other are stopped, so that each has the cores to itself and
slow changes of the machine's speed meet both. The clients run beside them here. Sampled answers of at most 100 tokens.

- `ratio`: tokens per second at 32 clients, ours over the peer's; `ratio_streaming`: the same, token by token.
- `added_latency_s`: median seconds of a 16-token answer to a single client, ours less the peer's.
- `cold_start`: seconds of our start, part by part: Python and Ray, the check of the files, the engine, its first token,
  then Ray Serve's own time until the service is ready, and the first token that a client gets. `ready_s` is all but the
  last, beside the peer's.
- `crowd`: so many connections at once for so many seconds, each asking again when it is answered: statuses, and the
  memory of all processes after each half.
- `killed`: two replicas, of which one is killed under load: requests under way when it was gone and how many of them
  failed, those begun later that failed, and seconds until there were two again.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.haproxy import free_ports
from sdft_ray.serving.load import Load, chat_body, press
from tests.support.processes import ray_processes

BOUND, BOUND_STREAMING, BOUND_LATENCY_S = 0.9, 0.75, 0.010
REPLICA = "ServeReplica:"
MODEL, CLIENTS, MAX_TOKENS = "teacher", 32, 100
MAX_SEQUENCES, KV_CACHE_BYTES = 64, 256 * 2**20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def peer_command(port: int) -> list[str]:
    """vLLM's OpenAI server with our engine arguments."""
    named = {
        "model": TEACHER, "served-model-name": MODEL, "host": "127.0.0.1", "port": port, "dtype": "auto",
        "kv-cache-memory-bytes": KV_CACHE_BYTES, "max-num-seqs": MAX_SEQUENCES, "max-logprobs": 20,
        "logprobs-mode": "raw_logprobs", "generation-config": "vllm", "uvicorn-log-level": "warning",
    }  # fmt: skip
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, *options, "--enforce-eager", "--disable-uvicorn-access-log"]


def our_command(port: int, folder: Path, **more: Any) -> list[str]:
    """`sdft serve`."""
    engine = {"max_sequences": MAX_SEQUENCES, "kv_cache_bytes": KV_CACHE_BYTES}
    settings = {"models": [{"name": MODEL, "source": str(TEACHER), "engine": engine}], **more}
    (folder / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "sdft_ray.cli", "serve", "--config", str(folder / "settings.yaml")]
    return [*command, "--port", str(port), "--store", str(folder / "store")]


@contextmanager
def server(kind: str, **more: Any) -> Iterator[tuple[str, psutil.Process, float]]:
    """A running server: address, process, seconds until it was ready. `more` goes to our settings."""
    with tempfile.TemporaryDirectory() as place:
        (port,), folder = free_ports(1), Path(place)
        command = our_command(port, folder, **more) if kind == "ours" else peer_command(port)
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, cwd=folder)
        try:
            while not is_ready(f"{url}/{'readyz' if kind == 'ours' else 'health'}"):
                if process.poll() is not None or time.monotonic() - began > 240:
                    raise SystemExit(f"{kind} does not come up:\n{(folder / 'log').read_text()[-3000:]}")
                time.sleep(0.1)
            yield url, psutil.Process(process.pid), time.monotonic() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def question(number: int) -> str:
    """Different ones of about equal length."""
    return f"A farmer has {number % 90 + 10} hens and sells {number % 10} of them. How many hens does the farmer keep?"


def loaded(url: str, clients: int, seconds: float, **other: Any) -> Load:
    """A time of sampled answers, each of its own seed."""
    return asyncio.run(
        press(
            f"{url}/v1",
            lambda number: chat_body(MODEL, question(number), seed=number, **other),
            clients=clients,
            seconds=seconds,
        )
    )


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (CLIENTS, {"max_tokens": MAX_TOKENS}),
    "streamed": (CLIENTS, {"max_tokens": MAX_TOKENS, "stream": True}),
    "alone": (1, {"max_tokens": 16, "temperature": 0.0}),
}
"""Number of clients, and what they ask."""


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Process and children do not run meanwhile."""
    family = [process, *process.children(recursive=True)]
    for each in family:
        each.suspend()
    try:
        yield
    finally:
        for each in reversed(family):
            each.resume()


def race(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Both servers, round after round; what was measured, by kind and way, with cold starts."""
    figures: dict[str, Any] = {kind: {way: [] for way in WAYS} for kind in ("peer", "ours")}
    with ExitStack() as running:
        peer, peer_process, figures["peer"]["ready_s"] = running.enter_context(server("peer"))
        with stopped(peer_process):
            ours, our_process, figures["ours"]["ready_s"] = running.enter_context(server("ours"))
            first_s = loaded(ours, 1, 0.001, max_tokens=2, stream=True).median_first_s
        figures["ours"]["cold_start"] = cold_start(ours, figures["ours"]["ready_s"], first_s)
        runners = {"peer": (peer, our_process), "ours": (ours, peer_process)}
        for number in range(options.rounds):
            order = list(runners) if number % 2 == 0 else list(reversed(runners))
            for way, kind in [(way, kind) for way in WAYS for kind in order]:
                url, other = runners[kind]
                figures[kind][way].append(turn(url, other, way, options.seconds))
            latest = {kind: {way: round(figures[kind][way][-1], 3) for way in WAYS} for kind in runners}
            console.print(f"round {number + 1}: {latest}", highlight=False, soft_wrap=True)
    return figures


def turn(url: str, other: psutil.Process, way: str, seconds: float) -> float:
    """One server asked in one way while the other stands still: tokens per second, or median seconds alone."""
    clients, options_of_way = WAYS[way]
    with stopped(other):
        loaded(url, clients, 1.0, **options_of_way)  # it was stopped itself
        load = loaded(url, clients, seconds, **options_of_way)
    assert set(load.statuses) == {200}, load.statuses
    return load.median_s if way == "alone" else load.tokens_per_s


def cold_start(url: str, ready_s: float, first_s: float) -> dict[str, float]:
    """Where the time until the first answer went."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        phases = json.load(answer)["data"][0]["cold_start"]
    return {"ray_and_serve_s": ready_s - sum(phases.values()), **phases, "ready_s": ready_s, "client_s": first_s}


def crowd(options: argparse.Namespace) -> dict[str, Any]:
    """Everyone at once; memory is looked at half-way and at the end."""
    statuses: dict[int, int] = {}
    memory = []
    with server("ours") as (url, process, _):
        for _ in range(2):
            load = loaded(url, options.crowd, options.crowd_seconds / 2, max_tokens=MAX_TOKENS)
            for status, count in load.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
            memory.append(sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]))
    return {"connections": options.crowd, "statuses": statuses, "memory_bytes": memory}


def num_ports(replica: psutil.Process) -> int:
    """How many it listens on; one more when its models have answered."""
    return sum(each.status == psutil.CONN_LISTEN for each in replica.net_connections())


async def kill_under_load(url: str, process: psutil.Process, seconds: float) -> tuple[float, float, float, Load]:
    """When a replica was killed, when it was gone, when there were two again, and what 16 clients saw."""
    load = asyncio.create_task(
        press(
            f"{url}/v1",
            lambda number: chat_body(MODEL, question(number), seed=number, max_tokens=MAX_TOKENS),
            clients=16,
            seconds=seconds,
        )
    )
    await asyncio.sleep(5)
    first = ray_processes(REPLICA, process.pid)[0]
    engines, ready = first.children(recursive=True), num_ports(first)
    killed = time.perf_counter()
    first.kill()
    while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:  # its kernel takes connections until then
        await asyncio.sleep(0.001)
    gone = time.perf_counter()
    while sum(num_ports(each) >= ready for each in ray_processes(REPLICA, process.pid)) < 2:
        await asyncio.sleep(0.2)
    back = time.perf_counter()
    left = [each for each in engines if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"engines of the killed replica still run: {left}"
    return killed, gone, back, await load


def a_kill(options: argparse.Namespace) -> dict[str, Any]:
    """A replica is killed under load."""
    with server("ours", replicas={"min": 2, "max": 2, "cpus": 0.5}) as (url, process, _):
        killed, gone, back, load = asyncio.run(kill_under_load(url, process, options.kill_seconds))
    under_way = [each for each in load.seen if each.began < gone and each.began + each.took_s > killed]
    later = [each for each in load.seen if each.began >= gone]
    return {
        "under_way": len(under_way),
        "under_way_failed": sum(each.status != 200 for each in under_way),
        "later": len(later),
        "later_failed": sum(each.status != 200 for each in later),
        "two_again_s": back - killed,
    }


def show(console: Console, figures: dict[str, Any]) -> None:
    table = Table("server", title=f"{CLIENTS} clients, {MODEL} of the laboratory", title_justify="left")
    for column in ("tokens/s", "streamed", "16 tokens alone", "ready after"):
        table.add_column(column, justify="right")
    for kind in ("peer", "ours"):
        middle = {way: statistics.median(figures[kind][way]) for way in WAYS}
        speeds = [f"{middle[way]:,.0f}" for way in ("whole", "streamed")]
        table.add_row(kind, *speeds, f"{1000 * middle['alone']:.1f} ms", f"{figures[kind]['ready_s']:.0f} s")
    console.print(table)


def compared(figures: dict[str, Any]) -> dict[str, Any]:
    """What is bounded, with its spread over the rounds."""
    peer, ours = figures["peer"], figures["ours"]
    results = {
        "ratio": [own / other for own, other in zip(ours["whole"], peer["whole"], strict=True)],
        "ratio_streaming": [own / other for own, other in zip(ours["streamed"], peer["streamed"], strict=True)],
        "added_latency_s": [own - other for own, other in zip(ours["alone"], peer["alone"], strict=True)],
    }
    middle = {name: statistics.median(values) for name, values in results.items()}
    within = (
        middle["ratio"] >= BOUND
        and middle["ratio_streaming"] >= BOUND_STREAMING
        and middle["added_latency_s"] <= BOUND_LATENCY_S
    )
    return {
        **middle,
        **{f"{name}_spread": [min(values), max(values)] for name, values in results.items()},
        "cold_start": ours["cold_start"],
        "peer_ready_s": peer["ready_s"],
        "within_bounds": within,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, a small crowd")
    parser.add_argument("--rounds", type=int, default=5, help="0: none")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--crowd", type=int, default=1000)
    parser.add_argument("--crowd-seconds", type=float, default=60.0)
    parser.add_argument("--kill-seconds", type=float, default=100.0, help="of load around a killed replica; 0: none")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.crowd, options.crowd_seconds = 1, 4.0, 100, 6.0
        options.kill_seconds = 0
    console = Console()
    figures: dict[str, Any] = {"benchmark": "serve"}
    if options.rounds:
        results = race(options, console)
        show(console, results)
        figures |= compared(results)
    if options.crowd:
        figures["crowd"] = crowd(options)
    if options.kill_seconds:
        figures["killed"] = a_kill(options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
