"""The training loop against a bare torch loop, TRL, padded batches and itself on two workers.

    python jobs/bench/train.py [--quick] [--rounds 3] [--only ARM ...] [--peer-python .venv-bench/bin/python]
    python jobs/bench/train.py --model DIR [--rows 2] [--quick] [--rounds 3]

All arms train a random Llama of 9.4 million parameters on the laboratory's mixed seed set, 8 rows of 512 tokens to a
step, on one core with one thread. They take turns, each in a process of its own; speed is in tokens of documents per
second once the first step is done.

- `ours_*` against `bare_*`: `sdft_ray.training.loop.train`, and the loop that one writes first, on the same packed
  rows in the same order, in float32 and in bfloat16 with float32 masters. Both must see the same losses.
- `trl_*`: TRL's SFTTrainer on the same documents, `packing=True` with rows of 512, no gradient checkpointing, in its
  own environment (`make bench-env`). All its forms run in the first round, and the fastest counts. Its packing lays
  all rows of a micro-batch into one sequence, over which attention is computed and masked by document. `trl_*` has the
  8 rows in one micro-batch, as every other arm has and as its default is; `trl_single_*` has one row at a time,
  accumulated over 8, which is the best that one can set on a CPU. The bound is for the former; both are shown.
- `packed` against `padded`: the bare loop in bfloat16 on our packed rows of the length in the laboratory's recipe, 256,
  and on documents in random order, each padded to the longest of its batch, as many as fit the same 2,048 tokens.
- `two_workers` against `ours_bf16`: the same step over two processes that meet through gloo, each on its own core.

With `--model`, a checkpoint takes the place of the random Llama, its tokenizer reads the documents, and a step has
`--rows` rows in one micro-batch. Only the loops are compared then.

With a GPU, the share of its matrix products that training reaches on blocks of an 8-billion Llama.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import QUICKSTART
from sdft_ray.recipe.recipe import Recipe

if TYPE_CHECKING:
    from sdft_ray.data.packing import PackedRows
    from sdft_ray.training.schedule import Precision

BOUNDS = {
    "bare_loop_ratio": 0.97,
    "trl_ratio": 3.0,
    "packed_over_padded": 1.5,
    "packing_efficiency": 0.98,
    "ddp_ratio": 1.7,
    "mfu": 0.5,
}
"""At least."""
ROW_TOKENS = 512
LABORATORY_ROW_TOKENS = Recipe.load(QUICKSTART).train.max_seq_len
CORES = sorted(os.sched_getaffinity(0))
PEER_PYTHON = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
PEER = Path(__file__).parent / "peers" / "trl_sft.py"

Figures = dict[str, Any]
Runs = dict[str, list[Figures]]


@dataclass(frozen=True)
class Subject:
    """What is asked for: the Python with TRL, and the checkpoint to train, None for the random Llama."""

    peer_python: Path
    model: Path | None
    model_rows: int
    """Rows of a step of the checkpoint."""


@dataclass(frozen=True)
class Arm:
    """What an arm runs, and its steps: in full, and with `--quick` (0: left out)."""

    run: Callable[[int, Subject], Figures]
    steps: int
    quick_steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one round of few steps: bfloat16 alone, TRL in its default form"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of an environment with TRL")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="a checkpoint in place of the random Llama")
    parser.add_argument("--rows", type=int, default=2, help="rows of a step, with --model")
    arguments = parser.parse_args()
    subject = Subject(arguments.peer_python, arguments.model, arguments.rows)
    if arguments.arm:
        print(json.dumps(ARMS[arguments.arm].run(arguments.steps, subject)))
        return
    chosen = ["facts", *(arguments.only or (LOOPS if subject.model else ARMS))]
    names = [name for name, arm in ARMS.items() if name in chosen and (not arguments.quick or arm.quick_steps)]
    if not arguments.peer_python.exists():
        print(f"{arguments.peer_python} is missing, so TRL is left out: `make bench-env` makes it", file=sys.stderr)
        names = [name for name in names if not name.startswith("trl")]
    if len(CORES) < 2 and "two_workers" in names:
        names.remove("two_workers")
    runs: Runs = {name: [] for name in names}
    for number in range(1 if arguments.quick else arguments.rounds):
        for name in in_turn(names, number, runs):
            steps = ARMS[name].quick_steps if arguments.quick else ARMS[name].steps
            runs[name].append(run_arm(name, steps, subject))
    show(runs)


def in_turn(names: Sequence[str], number: int, runs: Runs) -> list[str]:
    """The arms of a round, every other one backwards; after the first without what does not change, and with TRL's
    fastest forms alone."""
    if number == 0:
        return list(names)
    slower = {name for group in TRL for name in group if name in runs and name != fastest(group, runs)}
    left = [name for name in names if name not in slower | {"facts"}]
    return left[:: -1 if number % 2 else 1]


def fastest(group: Sequence[str], runs: Runs) -> str | None:
    """Of the arms that ran, by their first round."""
    return max((name for name in group if runs.get(name)), key=lambda name: speed(runs[name][0]), default=None)


def run_arm(name: str, steps: int, subject: Subject) -> Figures:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", name, "--steps", str(steps)]
    command += ["--peer-python", str(subject.peer_python), "--rows", str(subject.model_rows)]
    command += ["--model", str(subject.model)] if subject.model else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(precision: Precision) -> Callable[[int, Subject], Figures]:
    def run(steps: int, subject: Subject) -> Figures:
        alone()
        from jobs.bench.support.training import our_loop, trainee_of

        chosen = trainee_of(subject.model, subject.model_rows)
        return our_loop(packed(ROW_TOKENS, subject.model), steps, precision, trainee=chosen)

    return run


def bare(precision: Precision, row_tokens: int) -> Callable[[int, Subject], Figures]:
    def run(steps: int, subject: Subject) -> Figures:
        alone()
        from jobs.bench.support.training import bare_loop, packed_batches, trainee_of

        chosen = trainee_of(subject.model, subject.model_rows)
        batches = packed_batches(packed(row_tokens, subject.model), chosen.rows_per_step)
        return bare_loop(batches, steps, precision, trainee=chosen)

    return run


def padded(steps: int, _: Subject) -> Figures:
    """As many tokens to a micro-batch as `packed` has, padding and all."""
    alone()
    from jobs.bench.support.training import ROWS_PER_STEP, bare_loop, documents, padded_batches

    return bare_loop(padded_batches(documents(), ROWS_PER_STEP * LABORATORY_ROW_TOKENS), steps, "bf16")


def two_workers(steps: int, _: Subject) -> Figures:
    from jobs.bench.support.training import one_of_two

    spawn = multiprocessing.get_context("spawn")
    rows = packed(ROW_TOKENS)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=spawn) as pool:
        ranks = [pool.submit(one_of_two, rank, CORES[rank], folder, rows, steps) for rank in range(2)]
        first, second = (rank.result() for rank in ranks)
    cpu_s = first["num_tokens"] * (1 / first["tokens_per_cpu_s"] + 1 / second["tokens_per_cpu_s"])
    return {**first, "tokens_per_cpu_s": first["num_tokens"] / cpu_s}


def trl(precision: Precision, micro_batch_rows: int, attention: str = "sdpa") -> Callable[[int, Subject], Figures]:
    """The peer's script, on documents that it gets as token ids and labels."""

    def run(steps: int, subject: Subject) -> Figures:
        from jobs.bench.support import training
        from sdft_ray.lab.export import TEACHER

        texts = training.documents()
        labels = [[i if m else -100 for i, m in zip(t.ids, t.loss_mask, strict=True)] for t in texts]
        job = {
            "documents": {"input_ids": [text.ids for text in texts], "labels": labels},
            "config": training.MODEL,
            "tokenizer": str(TEACHER),
            "core": CORES[0],
            "precision": precision,
            "attention": attention,
            "row_tokens": ROW_TOKENS,
            "micro_batch_rows": micro_batch_rows,
            "rows_per_step": training.ROWS_PER_STEP,
            "learning_rate": training.LEARNING_RATE,
            "num_steps": steps,
            "warmup_steps": training.WARMUP_STEPS,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job), encoding="utf-8")
            done = subprocess.run([subject.peer_python, PEER, path], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run


def facts(_: int, __: Subject) -> Figures:
    """How full the packed rows are, and what a GPU does, if there is one."""
    import torch

    rows = packed(LABORATORY_ROW_TOKENS)
    results: Figures = {"packing_efficiency": rows.num_tokens / (rows.num_rows * rows.row_tokens), "gpu": None}
    if torch.cuda.is_available():
        from jobs.bench.support import training_gpu

        results["gpu"] = training_gpu.measure()
    return results


def alone() -> None:
    """One core and one thread for this process."""
    os.sched_setaffinity(0, CORES[:1])
    import torch

    torch.set_num_threads(1)


def packed(row_tokens: int, model: Path | None = None) -> PackedRows:
    from jobs.bench.support.training import documents
    from sdft_ray.data.packing import pack

    return pack(documents(model), row_tokens)


ARMS = {
    "facts": Arm(facts, 1, 1),
    "bare_fp32": Arm(bare("fp32", ROW_TOKENS), 4, 0),
    "ours_fp32": Arm(ours("fp32"), 4, 0),
    "bare_bf16": Arm(bare("bf16", ROW_TOKENS), 12, 3),
    "ours_bf16": Arm(ours("bf16"), 12, 3),
    "two_workers": Arm(two_workers, 12, 3),
    "packed": Arm(bare("bf16", LABORATORY_ROW_TOKENS), 9, 4),
    "padded": Arm(padded, 9, 4),
    "trl_bf16": Arm(trl("bf16", 8), 2, 2),
    "trl_fp32": Arm(trl("fp32", 8), 2, 0),
    "trl_single_bf16": Arm(trl("bf16", 1), 4, 0),
    "trl_single_fp32": Arm(trl("fp32", 1), 3, 0),
    "trl_single_bf16_eager": Arm(trl("bf16", 1, "eager"), 4, 0),
}
LOOPS = ("bare_fp32", "ours_fp32", "bare_bf16", "ours_bf16")
TRL = (("trl_bf16", "trl_fp32"), ("trl_single_bf16", "trl_single_fp32", "trl_single_bf16_eager"))
"""Of each group the fastest counts. Plain products as attention are left out of the first: five times slower there."""


def speed(figures: Figures) -> float:
    return figures["tokens_per_s"]


def show(runs: Runs) -> None:
    table = Table("arm", "tokens/s", "min", "max", "per CPU second", box=None)
    for name, values in runs.items():
        if name != "facts":
            speeds = [speed(run) for run in values]
            per_cpu = statistics.median(run["tokens_per_cpu_s"] for run in values)
            table.add_row(name, *(f"{v:,.0f}" for v in (statistics.median(speeds), min(speeds), max(speeds), per_cpu)))
    Console().print(table)
    [known] = runs["facts"]
    precisions = [precision for precision in ("fp32", "bf16") if f"ours_{precision}" in runs]
    loops = {p: ratios(runs, f"ours_{p}", f"bare_{p}") for p in precisions}
    peers = [fastest(group, runs) for group in TRL]
    ratio = min((statistics.median(values) for values in loops.values() if values), default=None)
    result: Figures = {
        "benchmark": "train",
        "ratio": ratio,
        "bare_loop_ratio": ratio,
        "bare_loop_ratios": loops,
        "bare_loop_cpu_ratios": {p: ratios(runs, f"ours_{p}", f"bare_{p}", "tokens_per_cpu_s") for p in precisions},
        "loss_differences": loss_differences(runs, "bare_fp32", "bare_bf16", "two_workers"),
        **median_of("trl_ratio", ratios(runs, "ours_bf16", peers[0])),
        **median_of("trl_single_rows_ratio", ratios(runs, "ours_bf16", peers[1])),
        "trl_arms": peers,
        **median_of("packed_over_padded", ratios(runs, "packed", "padded")),
        "packing_efficiency": known["packing_efficiency"],
        **median_of("ddp_ratio", ratios(runs, "two_workers", "ours_bf16")),
        "mfu": known["gpu"] and known["gpu"]["mfu"],
        **{f"bound_{name}": bound for name, bound in BOUNDS.items()},
        "runs": runs,
    }
    print(json.dumps(result))


def ratios(runs: Runs, arm: str, peer: str | None, figure: str = "tokens_per_s") -> list[float]:
    """An arm over its peer, round by round; none where one of them did not run."""
    pairs = zip(runs.get(arm, []), runs.get(peer or "", []), strict=False)
    return [one[figure] / other[figure] for one, other in pairs]


def median_of(name: str, values: list[float]) -> Figures:
    return {name: statistics.median(values) if values else None, f"{name}_all": values}


def loss_differences(runs: Runs, *arms: str) -> dict[str, float]:
    """The largest difference of a step's loss from our loop's on one worker, in nats."""
    differences = {}
    for arm in arms:
        mine = f"ours_{'fp32' if arm.endswith('fp32') else 'bf16'}"
        if runs.get(arm) and runs.get(mine):
            pairs = zip(runs[arm][0]["losses"], runs[mine][0]["losses"], strict=True)
            differences[arm] = max(abs(one - other) for one, other in pairs)
    return differences


if __name__ == "__main__":
    main()
