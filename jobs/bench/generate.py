"""The generation stage against bare vLLM: tokens per second once running, and the time to get there.

    python jobs/bench/generate.py [--quick] [--rows 2000] [--rounds 3]

Both answer the same rewriting prompts of the laboratory's seed set with the same teacher, sampling and engine
arguments, engine in one process with one thread. The peer is `vllm.LLM.generate` with all prompts in one call.
Ours is the stage `generate` on local Ray with one actor, row cache included. Each runs in a process of its own,
pinned to one core with everything that it starts, in turns. Speed counts from the loaded engine to the last
answer (ours: to the last receipt of committed rows). Start-up counts from the start of the peer's process, and from
the call of the stage on a Ray that is up, as it is on a cluster, to a loaded engine; a local Ray's own start is shown
apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.support.generation import laboratory_rows, make_job

BOUND_RATIO = 0.95
BOUND_STARTUP = 1.3
MAX_TOKENS = 128
MAX_SEQUENCES = 128
KV_CACHE_BYTES = 256 * 2**20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 300 rows")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_rows, rounds = (300, 1) if arguments.quick else (arguments.rows, arguments.rounds)
    if arguments.arm:
        print(json.dumps(ARMS[arguments.arm](num_rows)))
        return
    core = min(os.sched_getaffinity(0))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for number in range(rounds):
        for name in list(ARMS)[:: 1 if number % 2 else -1]:
            runs[name].append(run_arm(name, num_rows, core))
    show(runs)


def run_arm(name: str, num_rows: int, core: int) -> dict[str, float]:
    """One arm in a process pinned to `core`."""
    command = [sys.executable, __file__, "--arm", name, "--rows", str(num_rows)]
    environment = {**os.environ, **ENVIRONMENT, "BENCH_STARTED": str(time.time())}
    done = subprocess.run(
        ["taskset", "-c", str(core), *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def bare(num_rows: int) -> dict[str, float]:
    """vLLM alone."""
    from vllm import LLM, SamplingParams

    from sdft_ray.lab.export import TEACHER

    llm = LLM(
        model=str(TEACHER),
        dtype="bfloat16",
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=MAX_SEQUENCES,
        enforce_eager=True,
    )
    ready = time.time()
    prompts: Any = [{"prompt_token_ids": ids} for ids in prompts_ids(num_rows)]
    start = time.time()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), use_tqdm=False)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return figures(float(os.environ["BENCH_STARTED"]), ready, time.time() - start, num_tokens)


def ours(num_rows: int) -> dict[str, float]:
    """The stage on local Ray."""
    from sdft_ray.resources import Resources
    from sdft_ray.stages import files, generate
    from sdft_ray.stages.session import ray_session
    from sdft_ray.store.store import Store

    part = {"cpus": 1.0, "kv_cache_bytes": KV_CACHE_BYTES, "max_sequences": MAX_SEQUENCES}
    resources = Resources.model_validate({"cpus": 2, "generate": part})
    with tempfile.TemporaryDirectory() as folder, ray_session(resources):
        job = make_job(Store(folder), resources, laboratory_rows(num_rows))
        called = time.time()
        made = generate.run(job)
        log = (Path(folder) / job.address / files.PROGRESS).read_text().splitlines()
        done = datetime.fromisoformat(json.loads(log[-1])["time"]).timestamp()
    ready = made.summary["first_ready"]
    seen = figures(called, ready, done - ready, made.summary["response_tokens"])
    return {**seen, "ray_start_s": called - float(os.environ["BENCH_STARTED"])}


def prompts_ids(num_rows: int) -> list[list[int]]:
    """The rewriting prompts as token ids, as the stage makes them."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.generation.prompts import render_rewrite
    from sdft_ray.lab.export import TEACHER

    chat = ChatFormat(load_tokenizer(TEACHER))
    rows = [row for table in laboratory_rows(num_rows) for row in table.to_pylist()]
    return [chat.prompt_ids(render_rewrite("own_words", r["instruction"], r["reference_response"])) for r in rows]


def figures(started: float, ready: float, wall_s: float, num_tokens: int) -> dict[str, float]:
    return {
        "startup_s": ready - started,
        "wall_s": wall_s,
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / wall_s,
    }


ARMS = {"bare": bare, "ours": ours}


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    table = Table("arm", "tokens/s", "min", "max", "start-up s", "tokens", box=None)
    for name, values in runs.items():
        speeds = [run["tokens_per_s"] for run in values]
        startup_s = statistics.median(run["startup_s"] for run in values)
        numbers = f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f}", f"{max(speeds):,.0f}", f"{startup_s:.1f}"
        table.add_row(name, *numbers, f"{values[0]['num_tokens']:,.0f}")
    Console().print(table)
    pairs = list(zip(runs["ours"], runs["bare"], strict=True))
    ratios = [ours["tokens_per_s"] / bare["tokens_per_s"] for ours, bare in pairs]
    startups = [ours["startup_s"] / bare["startup_s"] for ours, bare in pairs]
    result: dict[str, Any] = {
        "bench": "generate",
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bound_ratio": BOUND_RATIO,
        "startup_ratio": statistics.median(startups),
        "startup_ratios": startups,
        "bound_startup_ratio": BOUND_STARTUP,
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
