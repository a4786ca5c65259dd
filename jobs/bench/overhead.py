"""What Ray and the store cost around generation: rows per second with a sampler that thinks nothing.

    python jobs/bench/overhead.py [--quick] [--rows 100000 2000000] [--rounds 3]

The stage `generate` itself runs on local Ray with two actors of the scripted sampler, from reading a seed set that
lies in the store to the finished artifact: keys, chunks, prompts, parts of the row cache, receipts, the table in seed
order. Ray's own start is not counted. Peak memory adds up all processes of the run, shared pages once. The bounds: at
least 10,000 rows per second on two cores; from the smallest set to the largest, memory grows by less than 10 % and
the time per row does not grow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import generate
from sdft_ray.stages.session import ray_session
from sdft_ray.stages.watch import MemoryWatch
from sdft_ray.store.store import Store
from tests.support.generation_job import farm_rows, make_job

POOL = {"sampler": "scripted", "cpus": 0.45, "min_actors": 2, "max_actors": 2, "max_sequences": 64}
BOUND_ROWS_PER_S = 10_000
BOUND_MEMORY_GROWTH = 1.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of 20,000 and 60,000 rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 2_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [20_000, 60_000] if arguments.quick else sorted(arguments.rows)
    rounds = 1 if arguments.quick else arguments.rounds
    walls: dict[int, list[float]] = {size: [] for size in sizes}
    peaks: dict[int, list[int]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            wall_s, peak = measure(size)
            walls[size].append(wall_s)
            peaks[size].append(peak)
    show(walls, peaks)


def measure(num_rows: int) -> tuple[float, int]:
    """Seconds and peak bytes of one run over `num_rows` rows, on a Ray of its own."""
    resources = Resources.model_validate({"generate": POOL})
    with tempfile.TemporaryDirectory() as folder:
        # Elsewhere, so that the memory that writing the rows takes is not this process's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
            elsewhere.submit(write_rows, folder, num_rows).result()
        with ray_session(resources), MemoryWatch() as memory:
            job = make_job(Store(folder), resources, [])
            start = time.perf_counter()
            result = generate.run(job)
            wall_s = time.perf_counter() - start
        assert result.summary["num_rows"] == num_rows
    return wall_s, memory.peak_rss_bytes


def write_rows(folder: str, num_rows: int) -> None:
    make_job(Store(folder), Resources(), farm_rows(num_rows))


def show(walls: dict[int, list[float]], peaks: dict[int, list[int]]) -> None:
    table = Table("rows", "rows/s", "min", "max", "peak GiB", box=None)
    rates = {}
    for size, values in walls.items():
        speed = sorted(size / wall_s for wall_s in values)
        rates[size] = statistics.median(speed)
        peak = statistics.median(peaks[size]) / 2**30
        table.add_row(f"{size:,}", f"{rates[size]:,.0f}", f"{speed[0]:,.0f}", f"{speed[-1]:,.0f}", f"{peak:.2f}")
    Console().print(table)
    small, large = min(walls), max(walls)
    figures: dict[str, Any] = {
        "benchmark": "overhead",
        "rows_per_s": {str(size): rate for size, rate in rates.items()},
        "rows_per_s_all": {str(size): [size / wall_s for wall_s in values] for size, values in walls.items()},
        "ratio": rates[large] / BOUND_ROWS_PER_S,
        "bound_ratio": 1.0,
        "bound_rows_per_s": BOUND_ROWS_PER_S,
        "memory_growth": statistics.median(peaks[large]) / statistics.median(peaks[small]),
        "bound_memory_growth": BOUND_MEMORY_GROWTH,
        "time_per_row_growth": rates[small] / rates[large],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
