"""Our evaluation beside plain lm-eval with its `hf` model: the same results item by item, and how much sooner.

    python jobs/bench/evaluate.py [--quick] [--rounds 3] [--dtype float32 bfloat16] [--batch-size 64] [--sampler vllm]

The laboratory's teacher and its seven tasks, on the cores of this machine. They take turns, the peer with all
threads, ours with as many engines as there are cores; what starting takes is told apart from the asking. Items are
compared one by one: right or wrong, and every text written.

The peer's batch size is 64 unless said otherwise (lm-eval's own default is 1, which is slower). In float32 two programs
that compute the same thing say the same; in bfloat16, the teacher's own, each rounds in its own way. `ratio` is the
peer's seconds over ours on the generation tasks, the smallest of all precisions. The last line is JSON.
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
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import export
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import evaluate
from sdft_ray.stages.evaluators import release_idle
from sdft_ray.stages.graph import steps
from sdft_ray.stages.job import StageContext, StageResult
from sdft_ray.stages.session import ray_session
from sdft_ray.stages.sources import Sources
from sdft_ray.store import files
from sdft_ray.store.store import Store

PEER = Path(__file__).with_name("peers") / "lm_eval_hf.py"
WRITTEN = ("lab_word_problems", "lab_lists")
CHOSEN = ("lab_facts", "lab_myths", "lab_ordering", "lab_scripts", "lab_pronouns")


def job_of(
    lab: Path, store: Path, task: str, number: int, resources: Resources, dtype: str, limit: int | None
) -> StageContext:
    """One evaluation of the teacher, as a recipe's step would be."""
    data = yaml.safe_load((lab / "quickstart.yaml").read_text(encoding="utf-8"))
    data["teacher"]["dtype"] = dtype
    data["evaluate"] = {"include": "./tasks", "tasks": [{"name": task}], **({"limit": limit} if limit else {})}
    recipe = Recipe.parse(data, base=lab)
    address = f"evaluate/{number:016x}"
    step = next(step for step in steps(recipe) if step.name == "evaluate:teacher")
    sources = Sources(recipe, Store(str(store)))
    return StageContext(
        step=step,
        address=address,
        store_url=Store(str(store)).url,
        recipe_name=recipe.name,
        resources=resources,
        teacher=sources.teacher,
        places=sources.places(step),
        inputs={},
        progress=_silent,
    )


def _silent(done: int, total: int, unit: str) -> None:
    """Nobody watches."""


def ours(job: StageContext) -> tuple[float, dict[str, dict[str, Any]]]:
    """Seconds of one step, and its items."""
    start = time.perf_counter()
    stage_result: StageResult = evaluate.run(job)
    seconds = time.perf_counter() - start
    assert stage_result.files, "the step places its files"
    rows = pq.read_table(job.store.staged(job.address, stage_result.files) / files.ITEMS).to_pylist()
    return seconds, {row["item"]: row for row in rows}


def peer(lab: Path, names: list[str], dtype: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """Plain lm-eval in a process of its own."""
    job = {"model": str(lab / "teacher"), "tasks": str(lab / "tasks"), "names": names}
    path = folder / "peer.json"
    path.write_text(json.dumps({**job, "dtype": dtype, "batch_size": batch_size}), encoding="utf-8")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "peer cache")}
    command = [sys.executable, str(PEER), str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def differing(name: str, mine: dict[str, dict[str, Any]], theirs: dict[str, Any]) -> int:
    """Items whose result or whose answer is not the same."""
    assert mine.keys() == theirs.keys(), name
    count = 0
    for item, row in mine.items():
        other = theirs[item]
        (value,) = other["metrics"].values()
        same_text = not isinstance(other["answer"], str) or row["response"] == other["answer"]
        count += row["value"] != float(value) or not same_text
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of both")
    parser.add_argument("--batch-size", type=int, default=64, help="the peer's")
    parser.add_argument("--sampler", default="vllm", choices=["vllm", "transformers"], help="our engines")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for dtype in options.dtype:
        figures[dtype] = measured(dtype, options)
        show(dtype, figures[dtype])
    by_dtype = {key: {dtype: result[key] for dtype, result in figures.items()} for key in ("ratio", "num_that_differ")}
    summary = {"ratio": min(by_dtype["ratio"].values()), "ratios": by_dtype["ratio"]}
    summary["num_that_differ"] = by_dtype["num_that_differ"]
    print(json.dumps({"benchmark": "evaluate", **vars(options), **summary, **figures}))


def measured(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds in one precision."""
    cores = len(os.sched_getaffinity(0))
    resources = Resources.model_validate({"evaluate": {"sampler": options.sampler, "num_actors": cores, "cpus": 0.9}})
    names = [*WRITTEN, *CHOSEN]
    mine: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    numbers = iter(range(10_000))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lab = export(folder / "lab")
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")

        def timed_run(name: str, limit: int | None = None) -> tuple[float, dict[str, dict[str, Any]]]:
            return ours(job_of(lab, folder / "store", name, next(numbers), resources, dtype, limit))

        with ray_session(resources):
            # Both kinds of questions, to all engines.
            startup_s = sum(timed_run(name, 2 * cores)[0] for name in (WRITTEN[0], CHOSEN[0]))
            for _ in range(1 if options.quick else options.rounds):
                theirs.append(peer(lab, names, dtype, options.batch_size, folder))
                mine.append({name: timed_run(name) for name in names})
            release_idle()
    return summary(mine, theirs, startup_s)


def summary(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], startup_s: float) -> dict[str, Any]:
    def seconds_of(names: tuple[str, ...]) -> tuple[list[float], list[float]]:
        return (
            [sum(result[name][0] for name in names) for result in mine],
            [sum(result["seconds"][name] for name in names) for result in theirs],
        )

    figures: dict[str, Any] = {"startup_s": startup_s, "peer_startup_s": [result["startup_s"] for result in theirs]}
    for kind, names in (("generation", WRITTEN), ("likelihood", CHOSEN)):
        ours_s, peer_s = seconds_of(names)
        ratios = [there / here for here, there in zip(ours_s, peer_s, strict=True)]
        figures[kind] = {
            "ours_s": ours_s,
            "peer_s": peer_s,
            "ratio": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    wrong = {name: differing(name, mine[0][name][1], theirs[0]["items"][name]) for name in mine[0]}
    total = sum(len(result["items"][name]) for result in theirs[:1] for name in wrong)
    return {
        "ratio": figures["generation"]["ratio"],
        "num_that_differ": sum(wrong.values()),
        "items": total,
        "items_that_differ": wrong,
        **figures,
    }


def show(dtype: str, figures: dict[str, Any]) -> None:
    table = Table(dtype, "ours, s", "lm-eval hf, s", "ratio", box=None)
    for kind in ("generation", "likelihood"):
        part = figures[kind]
        low, high = part["spread"]
        times = [f"{statistics.median(part[who]):.1f}" for who in ("ours_s", "peer_s")]
        table.add_row(kind, *times, f"{part['ratio']:.2f} ({low:.2f} to {high:.2f})")
    startup = statistics.median(figures["peer_startup_s"])
    table.add_row("start-up", f"{figures['startup_s']:.1f}", f"{startup:.1f}", "")
    console = Console()
    console.print(table)
    different = {name: count for name, count in figures["items_that_differ"].items() if count}
    console.print(
        f"{figures['num_that_differ']} of {figures['items']:,} items differ{f': {different}' if different else ''}"
    )


if __name__ == "__main__":
    main()
