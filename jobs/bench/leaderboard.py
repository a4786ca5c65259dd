"""A real model on the six leaderboard tasks with real questions, item by item beside plain lm-eval with its `hf` model.

    python jobs/bench/leaderboard.py [MODEL] [--data DIR] [--only TASK ...] [--limit 100] [--quick] [--sampler NAME]

MODEL is a folder, without it a tiny model of random weights; DIR holds the data sets as files in the form of
`evaluate.data` (`SDFT_REAL_DATA`, else `../shared/real`). Both sides read the same files in float32 on the CPU, take
the first `--limit` items of each task (of MMLU as many of each subject as come to that number), and the same few-shot
examples: fewer than the leaderboard's, for time. Ours goes through `evaluate.data` and an engine; the peer through task
files of its own, with the paths in them.

`ratio` is the share of items that score the same; a generated text must be the same too. `max_difference` is the
largest difference of an option's log-likelihood, in nats. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from rich.console import Console
from rich.table import Table

from sdft_ray.evaluation.harness import EvalConfig, Result, evaluate_with
from sdft_ray.evaluation.lm import BatchedLM
from sdft_ray.evaluation.questions import Answer, Question
from sdft_ray.recipe.resources import Engine
from sdft_ray.stages.evaluators import answers
from sdft_ray.stages.samplers import local_sampler
from tests.support.tiny import make_model

PEER = Path(__file__).with_name("peers") / "lm_eval_leaderboard.py"
DATA = Path(os.environ.get("SDFT_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "real"))
SHOTS = {"arc_challenge": 0, "hellaswag": 0, "mmlu": 1, "truthfulqa_mc2": 0, "winogrande": 2, "gsm8k": 2}
"""HellaSwag has none, since its train split is not among the files."""
METRICS = {
    "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "mmlu": "acc", "truthfulqa_mc2": "acc", "winogrande": "acc",
    "gsm8k": "exact_match,strict-match",
}  # fmt: skip
NUM_SUBJECTS = 57
BOUND_RATIO = 1.0


class RecordingLM(BatchedLM):
    """Keeps the log-likelihood of every option by task, item and option."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.options: dict[tuple[str, int, int], float] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the parent's."""
        found = super().loglikelihood(requests, disable_tqdm)
        for request, (value, _) in zip(requests, found, strict=True):
            self.options[str(request.task_name), int(request.doc_id or 0), request.idx] = value
        return found


def ours(model: Path, data: Path, task: str, limit: int, sampler: str) -> tuple[Result, RecordingLM]:
    """One task through our harness and an engine in this process."""
    config = EvalConfig(
        [task],
        limit=limit,
        num_fewshot=SHOTS[task],
        metrics={task: METRICS[task]},
        apply_chat_template=False,
        data=data,
    )
    with ExitStack() as stack:
        held: list[Any] = []

        def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
            if not held:
                held.append(stack.enter_context(closing(local_sampler(model, sampler, Engine(), "float32"))))
            return answers(held[0], questions)

        lms: list[RecordingLM] = []

        def create(counter: Any) -> RecordingLM:
            lms.append(RecordingLM(model, ask, counter))
            return lms[0]

        return evaluate_with(create, config), lms[0]


def peer(model: Path, data: Path, task: str, limit: int) -> dict[str, Any]:
    """Plain lm-eval on the same files, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": str(model), "data": str(data), "task": task, "num_fewshot": SHOTS[task], "limit": limit}
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([sys.executable, str(PEER), str(path)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(task: str, result: Result, lm: RecordingLM, theirs: dict[str, Any]) -> dict[str, Any]:
    """Items that agree, and how far log-likelihoods differ."""
    metric, _, filtered_by = METRICS[task].partition(",")
    mine = {(row["item"] if "/" in row["item"] else f"{task}/{row['item']}"): row for row in result.items}
    chosen = filtered_by or "none"
    rows = {key.partition("|")[0]: row for key, row in theirs["items"].items() if row["filter"] == chosen}
    assert mine.keys() == rows.keys(), f"{task}: not the same items"
    differing, largest = [], 0.0
    for key, row in rows.items():
        same = abs(mine[key]["value"] - row["metrics"][metric]) < 1e-6
        if isinstance(row["answers"][0], str):
            same = same and mine[key]["response"] == row["answers"][0]
        else:
            leaf, _, item = key.rpartition("/")
            found = [lm.options[leaf, int(item), number] for number in range(len(row["answers"]))]
            largest = max(largest, *(abs(one - other) for one, other in zip(found, row["answers"], strict=True)))
        differing += [] if same else [key]
    values = [row["metrics"][metric] for row in rows.values()]
    return {
        "num_items": len(rows),
        "num_same": len(rows) - len(differing),
        "differing": differing[:20],
        "max_difference": largest,
        "score": result.scores.tasks[task].value,
        "peer_score": sum(values) / len(values),
        "num_fewshot": SHOTS[task],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", nargs="?", help="without it: random weights")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets")
    parser.add_argument("--only", nargs="+", choices=list(SHOTS), default=list(SHOTS), help="tasks")
    parser.add_argument("--limit", type=int, default=100, help="items of each task, at least")
    parser.add_argument("--quick", action="store_true", help="ten items of each task")
    parser.add_argument("--sampler", default="transformers", choices=["transformers", "vllm"], help="our engine")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(json.dumps({"benchmark": "leaderboard", "ratio": None, "why": f"no data sets at {options.data}"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder), max_position_embeddings=4096)
        run(model, options)


def run(model: Path, options: argparse.Namespace) -> None:
    """All tasks, one after the other."""
    limit = 10 if options.quick else options.limit
    tasks: dict[str, Any] = {}
    table = Table(
        "task", "shots", "items", "same", "max. difference", "score", "lm-eval hf", "s", "lm-eval hf, s", box=None
    )
    for task in options.only:
        each = -(-limit // NUM_SUBJECTS) if task == "mmlu" else limit
        start = time.perf_counter()
        theirs = peer(model, options.data, task, each)
        middle = time.perf_counter()
        found = compare(task, *ours(model, options.data, task, each, options.sampler), theirs)
        seconds = {"seconds": time.perf_counter() - middle, "peer_seconds": middle - start}
        tasks[task] = found | seconds
        counts = (str(SHOTS[task]), f"{found['num_items']}", f"{found['num_same']}", f"{found['max_difference']:.1e}")
        times = (f"{seconds['seconds']:.0f}", f"{seconds['peer_seconds']:.0f}")
        table.add_row(task, *counts, f"{found['score']:.4f}", f"{found['peer_score']:.4f}", *times)
    Console().print(table)
    num_items, num_same = (sum(found[key] for found in tasks.values()) for key in ("num_items", "num_same"))
    summary = {
        "benchmark": "leaderboard",
        "ratio": num_same / num_items,
        "bound_ratio": BOUND_RATIO,
        "num_items": num_items,
        "max_difference": max(found["max_difference"] for found in tasks.values()),
        "sampler": options.sampler,
        "tasks": tasks,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
