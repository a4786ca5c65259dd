"""The service against vLLM's own OpenAI server: tokens per second, latency, a crowd of clients, and a cold start.

    python jobs/bench/serve.py [--quick] [--rounds 3] [--seconds 10] [--crowd 1000] [--crowd-seconds 60]

Both serve the laboratory's teacher with the same engine arguments on the same cores, by turns, each in processes of its
own; the clients run beside them here. Sampled answers of at most 100 tokens.

- `ratio`: tokens per second at 32 clients, ours over the peer's; `ratio_streaming`: the same, token by token.
- `added_latency_s`: median seconds of a 16-token answer to a single client, ours less the peer's.
- `crowd`: that many connections at once for a minute, every one asking again when it is answered: statuses, and how
  much the memory of the service has grown from its first half to its end.
- `cold_start`: seconds from the command to Ray, to the service, and to the first token.

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.front import free_ports
from sdft_ray.serving.load import Load, chat_body, press

BOUND, BOUND_STREAMING, BOUND_LATENCY_S = 0.9, 0.75, 0.010
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


def our_command(port: int, folder: Path, **limits: Any) -> list[str]:
    """`sdft serve`."""
    engine = {"max_sequences": MAX_SEQUENCES, "kv_cache_bytes": KV_CACHE_BYTES}
    settings = {"models": [{"name": MODEL, "source": str(TEACHER), "engine": engine}], "limits": limits}
    (folder / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "sdft_ray.cli", "serve", "--config", str(folder / "settings.yaml")]
    return [*command, "--port", str(port), "--store", str(folder / "store")]


@contextmanager
def server(kind: str, **limits: Any) -> Iterator[tuple[str, psutil.Process, float]]:
    """A running server: address, process, seconds until it was ready."""
    with tempfile.TemporaryDirectory() as place:
        (port,), folder = free_ports(1), Path(place)
        command = our_command(port, folder, **limits) if kind == "ours" else peer_command(port)
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


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One server, once."""
    with server(kind) as (url, process, ready_s):
        figures: dict[str, Any] = {"kind": kind, "ready_s": ready_s}
        for name, stream in (("whole", False), ("streamed", True)):
            loaded(url, CLIENTS, 2.0, max_tokens=MAX_TOKENS, stream=stream)  # warms it up
            load = loaded(url, CLIENTS, options.seconds, max_tokens=MAX_TOKENS, stream=stream)
            assert set(load.statuses) == {200}, load.statuses
            figures[name], figures[f"{name}_events"] = load.tokens_per_s, load.events_per_s
        figures["alone_s"] = loaded(url, 1, options.seconds, max_tokens=16, temperature=0.0).median_s
        if kind == "ours" and options.crowd:
            figures["crowd"] = crowd(url, process, options)
            options.crowd = 0  # once is enough
    return figures


def crowd(url: str, process: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """Everyone at once; memory is looked at half-way and at the end."""
    statuses: dict[int, int] = {}
    memory = []
    for _ in range(2):
        load = loaded(url, options.crowd, options.crowd_seconds / 2, max_tokens=MAX_TOKENS)
        for status, count in load.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
        memory.append(sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]))
    return {"connections": options.crowd, "statuses": statuses, "memory_bytes": memory}


def show(console: Console, rounds: list[dict[str, dict[str, Any]]]) -> None:
    table = Table("server", title=f"{CLIENTS} clients, {MODEL} of the laboratory", title_justify="left")
    for column in ("tokens/s", "streamed", "events/s", "16 tokens alone", "ready after"):
        table.add_column(column, justify="right")
    for kind in ("peer", "ours"):
        told = [found[kind] for found in rounds]

        def middle(name: str, told: list[dict[str, Any]] = told) -> float:
            return statistics.median(each[name] for each in told)

        table.add_row(
            kind,
            f"{middle('whole'):,.0f}",
            f"{middle('streamed'):,.0f}",
            f"{middle('streamed_events'):,.0f}",
            f"{1000 * middle('alone_s'):.1f} ms",
            f"{middle('ready_s'):.0f} s",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, a small crowd")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--crowd", type=int, default=1000)
    parser.add_argument("--crowd-seconds", type=float, default=60.0)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.crowd, options.crowd_seconds = 1, 4.0, 100, 6.0
    console, rounds = Console(), []
    for number in range(options.rounds):
        order = ("peer", "ours") if number % 2 == 0 else ("ours", "peer")
        rounds.append({kind: measure(kind, options) for kind in order})
        console.print(f"round {number + 1}: {rounds[-1]}", highlight=False, soft_wrap=True)
    show(console, rounds)
    ratios = [found["ours"]["whole"] / found["peer"]["whole"] for found in rounds]
    streaming = [found["ours"]["streamed"] / found["peer"]["streamed"] for found in rounds]
    added = [found["ours"]["alone_s"] - found["peer"]["alone_s"] for found in rounds]
    figures = {
        "benchmark": "serve",
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "ratio_streaming": statistics.median(streaming),
        "ratio_streaming_spread": [min(streaming), max(streaming)],
        "added_latency_s": statistics.median(added),
        "added_latency_s_spread": [min(added), max(added)],
        "crowd": next((found["ours"]["crowd"] for found in rounds if "crowd" in found["ours"]), None),
    }
    figures["within_bounds"] = (
        figures["ratio"] >= BOUND
        and figures["ratio_streaming"] >= BOUND_STREAMING
        and figures["added_latency_s"] <= BOUND_LATENCY_S
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
