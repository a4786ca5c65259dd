"""What a kill costs: runs of the stage `generate` that are killed at random, seeded points and complete all the same.

    python jobs/bench/restart.py [--quick] [--rows 20000] [--rounds 1] [--small 4] [--vllm 5]

Four targets get SIGKILL: the driver with every process that it started (the same command then runs again), an actor of
the pool, a worker node of a local cluster, and vLLM's engine process.

Scripted runs use an external OpenAI-compatible server that answers from a script and counts every token that it
returns: `--rounds` runs of `--rows` rows for each of driver, actor and node, then `--small` runs of 2,000 rows for
each. The table must equal, byte for byte, that of an undisturbed run. Runs with real vLLM rewrite 300 rows of the
laboratory; actor, engine and driver take turns. In each run every id must occur once, and rows that were finished
before the kill must not change.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.killed_generation import Case, run, serving

BOUND_RATIO = 1.02
BOUND_ROWS_LOST = 64 + 64
"""The requests in flight in one actor, and one part."""
SMALL_ROWS = 2_000
VLLM_ROWS = 300
TARGETS = ("driver", "actor", "node")
VLLM_TARGETS = ("actor", "engine", "driver")


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
    arguments = parser.parse_args()
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


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("sampler", "killed", "rows done then", "answers lost", "tokens / one pass", "bound", box=None)
    for figures in runs:
        lost, ratio = (f"{figures['rows_lost']:.0f}", f"{figures['ratio']:.4f}") if "ratio" in figures else ("", "")
        bound = f"{BOUND_RATIO}" if figures["rows"] > SMALL_ROWS else ""
        then = f"{figures['rows_done_then']:,} of {figures['rows']:,}"
        table.add_row(figures["sampler"], figures["killed"], then, lost, ratio, bound)
    Console().print(table)
    largest = max(figures["rows"] for figures in runs if "ratio" in figures)
    ratios = [figures["ratio"] for figures in runs if figures["rows"] == largest]
    result = {
        "benchmark": "restart",
        "rows": largest,
        "ratio": max(ratios),
        "median_ratio": statistics.median(ratios),
        "bound_ratio": BOUND_RATIO,
        "rows_lost": max(figures["rows_lost"] for figures in runs if "ratio" in figures),
        "bound_rows_lost": BOUND_ROWS_LOST,
        "num_runs": len(runs),
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
