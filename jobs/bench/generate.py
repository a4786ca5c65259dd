"""The generation stage against bare vLLM: tokens per second once running, and the time to get there.

    python jobs/bench/generate.py [--quick] [--rows 2000] [--rounds 3] [--no-shared]
    python jobs/bench/generate.py --model DIR --data dolly.jsonl.gz --rows 100

All arms answer the same rewriting prompts with the same teacher, sampling and engine arguments, engine in one process
with one thread: the laboratory's teacher and seed set, or the checkpoint in DIR and rows of a file. They take turns,
each in a process of its own:

- `float32`, `bfloat16`: `vllm.LLM.generate` in that data type, with all prompts in one call, pinned to one core. The
  bound is for the faster of the two.
- `ours`: the stage `generate` on a local Ray cluster whose one worker node, with the actor and Ray's own processes of
  that node, is pinned to the same core. The head and the driver have the other core, as on a cluster they have
  another machine.
- `shared`: the stage on local Ray, everything pinned to that one core. Shown, not bounded.

Speed counts from the loaded engine to the last answer (the stage: to the last receipt of committed rows), from
seed rows to text for all arms. Start-up counts from the start of the peer's process, and from the call of the stage on
a Ray that is up and idle, to the loaded engine; Ray's own start is shown apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import TEACHER
from tests.support.generation_job import laboratory_rows, make_job

BOUND_RATIO = 0.9
BOUND_STARTUP = 1.3
CORE = min(os.sched_getaffinity(0))
MAX_TOKENS = 128
MAX_SEQUENCES = 128
SETTLE_S = 5
"""Ray's own processes still start when it says that it is up."""
KV_CACHE_BYTES, GIVEN_KV_CACHE_BYTES = 256 * 2**20, 2**30
"""For the laboratory's teacher, and for a model that is given."""
MAX_MODEL_TOKENS = 2048
"""Of a model and rows that are given; rows whose texts have more than twice as many characters are left out."""
BARE = ("float32", "bfloat16")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Work:
    """What is answered by what; `data` is "" for the laboratory's rows."""

    model: str
    data: str
    num_rows: int

    def tables(self) -> Iterator[pa.Table]:
        """Rows in tables of `SEED_SCHEMA`."""
        if not self.data:
            yield from laboratory_rows(self.num_rows)
            return
        from sdft_ray.data.rows import read_source
        from sdft_ray.generation.checks import check_error
        from sdft_ray.recipe.inputs import SeedSet

        texts, left = ("instruction", "context", "reference_response"), self.num_rows
        for table in read_source(SeedSet(source=self.data), check_error):
            sizes = [sum(len(row[name]) for name in texts) for row in table.to_pylist()]
            short = table.filter(pa.array([size <= 2 * MAX_MODEL_TOKENS for size in sizes])).slice(0, left)
            left -= short.num_rows
            yield short
            if not left:
                return

    def prompts_ids(self) -> list[list[int]]:
        """The rewriting prompts as token ids, as the stage makes them."""
        from sdft_ray.data.chat import ChatFormat, load_tokenizer
        from sdft_ray.data.messages import prompt_of
        from sdft_ray.generation.prompts import render_rewrite

        chat, rows = ChatFormat(load_tokenizer(self.model)), [row for t in self.tables() for row in t.to_pylist()]
        prompts = [render_rewrite("own_words", row["instruction"], row["reference_response"]) for row in rows]
        return [chat.prompt_ids(prompt_of(text, row["context"])) for text, row in zip(prompts, rows, strict=True)]

    @property
    def max_model_tokens(self) -> int | None:
        return MAX_MODEL_TOKENS if self.data else None

    @property
    def kv_cache_bytes(self) -> int:
        return GIVEN_KV_CACHE_BYTES if self.data else KV_CACHE_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 300 rows, without the arm `shared`")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-shared", action="store_true", help="without the arm `shared`")
    parser.add_argument("--model", default=str(TEACHER), help="checkpoint directory; default: the laboratory's teacher")
    parser.add_argument("--data", default="", help="rows in a file, such as Dolly's; default: the laboratory's")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_rows, rounds = (300, 1) if arguments.quick else (arguments.rows, arguments.rounds)
    work = Work(arguments.model, arguments.data, num_rows)
    if arguments.arm:
        print(json.dumps(ARMS[arguments.arm](work)))
        return
    arms = [name for name in ARMS if name != "shared" or not (arguments.quick or arguments.no_shared)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in arms[:: 1 if number % 2 else -1]:
            runs[name].append(run_arm(name, work))
    show(runs)


def run_arm(name: str, work: Work) -> dict[str, Any]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", name, "--rows", str(work.num_rows), "--model", work.model]
    command += ["--data", work.data]
    environment = {**os.environ, **ENVIRONMENT, "BENCH_STARTED": str(time.time())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bare(dtype: str, work: Work) -> dict[str, Any]:
    """vLLM alone."""
    os.sched_setaffinity(0, {CORE})
    from vllm import LLM, SamplingParams

    engine: Any = {"dtype": dtype, "max_model_len": work.max_model_tokens}
    llm = LLM(
        model=work.model,
        kv_cache_memory_bytes=work.kv_cache_bytes,
        max_num_seqs=MAX_SEQUENCES,
        enforce_eager=True,
        **engine,
    )
    ready = time.time()
    prompts: Any = [{"prompt_token_ids": ids} for ids in work.prompts_ids()]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS), use_tqdm=False)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return figures(float(os.environ["BENCH_STARTED"]), ready, time.time() - ready, num_tokens)


def ours(work: Work) -> dict[str, Any]:
    """The stage, its actor on a node of one core."""
    with node_of_one_core():
        return run_stage(work)


def shared(work: Work) -> dict[str, Any]:
    """The stage on local Ray, all of it on one core."""
    os.sched_setaffinity(0, {CORE})
    return run_stage(work)


def run_stage(work: Work) -> dict[str, Any]:
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages import generate
    from sdft_ray.stages.session import ray_session
    from sdft_ray.store import files
    from sdft_ray.store.store import Store

    part: dict[str, Any] = {"cpus": 1.0, "kv_cache_bytes": work.kv_cache_bytes, "max_sequences": MAX_SEQUENCES}
    part["max_model_tokens"] = work.max_model_tokens
    resources = Resources.model_validate({"cpus": 2, "generate": part})
    with tempfile.TemporaryDirectory() as folder, ray_session(resources):
        job = make_job(Store(folder), resources, work.tables(), Path(work.model))
        time.sleep(SETTLE_S)
        called = time.time()
        result = generate.run(job)
        log = (job.store.staged(job.address, result.files) / files.PROGRESS).read_text().splitlines()
        done = datetime.fromisoformat(json.loads(log[-1])["time"]).timestamp()
    ready = result.summary["first_ready"]
    measured = figures(called, ready, done - ready, result.summary["response_tokens"])
    started = called - float(os.environ["BENCH_STARTED"])
    return {**measured, "ray_start_s": started, "engines": result.summary["engines"]}


@contextmanager
def node_of_one_core() -> Iterator[None]:
    """A head without work for actors on the other cores, and a node on `CORE`. Processes inherit their core."""
    import ray
    from ray.cluster_utils import Cluster

    os.sched_setaffinity(0, os.sched_getaffinity(0) - {CORE} or {CORE})
    mine = os.sched_getaffinity(0)
    memory = 100 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    os.sched_setaffinity(0, {CORE})
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    os.sched_setaffinity(0, mine)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def figures(started: float, ready: float, wall_s: float, num_tokens: int) -> dict[str, Any]:
    return {
        "startup_s": ready - started,
        "wall_s": wall_s,
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / wall_s,
    }


ARMS = {**{dtype: partial(bare, dtype) for dtype in BARE}, "ours": ours, "shared": shared}


def show(runs: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("arm", "tokens/s", "min", "max", "start-up s", "tokens", box=None)
    for name, values in runs.items():
        speeds = [run["tokens_per_s"] for run in values]
        startup_s = statistics.median(run["startup_s"] for run in values)
        numbers = f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f}", f"{max(speeds):,.0f}", f"{startup_s:.1f}"
        table.add_row(name, *numbers, f"{values[0]['num_tokens']:,.0f}")
    Console().print(table)
    faster = max(BARE, key=lambda dtype: statistics.median(run["tokens_per_s"] for run in runs[dtype]))

    def ratios(arm: str, figure: str) -> list[float]:
        return [ours[figure] / bare[figure] for ours, bare in zip(runs[arm], runs[faster], strict=True)]

    speeds, startups = ratios("ours", "tokens_per_s"), ratios("ours", "startup_s")
    result: dict[str, Any] = {
        "benchmark": "generate",
        "faster_dtype": faster,
        "dtypes": sorted({engine["dtype"] for run in runs["ours"] for engine in run["engines"]}),
        "ratio": statistics.median(speeds),
        "ratios": speeds,
        "bound_ratio": BOUND_RATIO,
        "startup_ratio": statistics.median(startups),
        "startup_ratios": startups,
        "bound_startup_ratio": BOUND_STARTUP,
        "shared_core_ratios": ratios("shared", "tokens_per_s") if "shared" in runs else [],
        "shared_core_startup_ratios": ratios("shared", "startup_s") if "shared" in runs else [],
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
