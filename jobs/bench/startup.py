"""How long the light commands take: `sdft --help` (bound 0.5 s), `sdft explain` (bound 1 s), beside a bare interpreter.

    python jobs/bench/startup.py [--quick] [--rounds N]

Whole processes are timed in turns, so that a machine that drifts drifts for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml"
BOUNDS_S = {"sdft --help": 0.5, "sdft explain": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    sdft = [sys.executable, "-m", "sdft_ray.cli"]
    with tempfile.TemporaryDirectory() as store:
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import sdft_ray": [sys.executable, "-c", "import sdft_ray"],
            "sdft --help": [*sdft, "--help"],
            "sdft explain": [*sdft, "explain", str(RECIPE), "--store", store],
        }
        walls: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                if number:  # the first round fills caches
                    walls[name].append(time.perf_counter() - start)
    table = Table("command", "median s", "min", "max", "bound", box=None)
    figures = {}
    for name, values in walls.items():
        median = statistics.median(values)
        figures[name] = {"median_s": median, "min_s": min(values), "max_s": max(values), "bound_s": BOUNDS_S.get(name)}
        bound = BOUNDS_S.get(name)
        table.add_row(name, f"{median:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", str(bound or ""))
    Console().print(table)
    ratio = max(figures[name]["median_s"] / bound for name, bound in BOUNDS_S.items())
    summary = {"ratio": ratio, "bound_ratio": 1.0, "rounds": rounds, "commands": figures}
    print(json.dumps({"benchmark": "startup", **summary}))


if __name__ == "__main__":
    main()
