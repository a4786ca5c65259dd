"""Memory and time of the output head with its loss, in chunks against all logits at once.

    python jobs/bench/loss_head.py [--quick] [--rounds 3] [--objective cross_entropy|forward_kl]

One forward and backward pass through a head of 131,072 tokens and 512 channels for 4,096 response tokens, float32, for
each objective named. Each pass runs in a process of its own; extra memory is the peak above what was there before,
without the gradients that it leaves behind. The bounds: extra memory at most 1/8 of the logits in float32, gradients
equal to those of the full computation within 1e-5 of their largest element.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SIZES = (131_072, 512, 4096)
QUICK_SIZES = (131_072, 64, 4096)
OBJECTIVES = ("cross_entropy", "forward_kl")
WAYS = ("full", "chunked")
BOUND_MEMORY = 1 / 8
BOUND_ERROR = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of cross-entropy, 64 channels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objective", choices=OBJECTIVES, action="append")
    parser.add_argument("--once", nargs=2, metavar=("WAY", "OBJECTIVE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK_SIZES if arguments.quick else SIZES
    if arguments.once:
        way, objective = arguments.once
        print(json.dumps(compare(sizes, objective) if way == "compare" else measure(sizes, way, objective)))
        return
    rounds = 1 if arguments.quick else arguments.rounds
    results = {}
    for objective in arguments.objective or (OBJECTIVES[:1] if arguments.quick else OBJECTIVES):
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                runs[way].append(elsewhere(way, objective, arguments.quick))
        results[objective] = {**runs, "error": elsewhere("compare", objective, arguments.quick)["error"]}
    show(results, sizes)


def elsewhere(way: str, objective: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", way, objective, *(["--quick"] if quick else [])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(sizes: tuple[int, int, int], way: str, objective: str) -> dict[str, float]:
    """Seconds and extra bytes of one pass."""
    problem((1024, 64, 4096), objective)(way)  # libraries load what they need
    step = problem(sizes, objective)
    with Peak() as peak:
        start = time.perf_counter()
        gradients = step(way)
        wall_s = time.perf_counter() - start
    left_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return {"wall_s": wall_s, "extra_bytes": peak.extra_bytes - left_bytes}


def compare(sizes: tuple[int, int, int], objective: str) -> dict[str, float]:
    """The largest difference of a gradient's element, as a share of the largest element."""
    step = problem(sizes, objective)
    pairs = zip(step("chunked"), step("full"), strict=True)
    return {"error": max(float((ours - full).abs().max() / full.abs().max()) for ours, full in pairs)}


def problem(sizes: tuple[int, int, int], objective: str) -> Any:
    """A function that makes one pass in a way and returns the gradients of hidden states and head."""
    import torch

    from sdft_ray.recipe.arms import Objective
    from sdft_ray.training.head import head_loss
    from sdft_ray.training.objective import TeacherOutputs, chunk_loss

    vocab, hidden, num_tokens = sizes
    torch.manual_seed(0)
    head, teacher_head = (torch.nn.Linear(hidden, vocab, bias=False) for _ in range(2))
    hidden_ND, teacher_ND = torch.randn(2, num_tokens, hidden)
    hidden_ND.requires_grad_()
    targets_N = torch.randint(vocab, (num_tokens,))
    terms: dict[str, Any] = {"cross_entropy": 0.0, objective: 1.0}
    teacher = TeacherOutputs(teacher_ND, teacher_head.requires_grad_(False), None)

    def step(way: str) -> list[Any]:
        loss_of = chunk_loss(Objective(**terms), targets_N, teacher, {}, None)
        whole = {"max_logits": num_tokens * vocab} if way == "full" else {}
        loss = head_loss(hidden_ND, head, loss_of, **whole) / num_tokens
        return list(torch.autograd.grad(loss, [hidden_ND, head.weight]))

    return step


class Peak:
    """The highest resident memory of this process inside the block, above that at its start."""

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._before = self._highest = _resident_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._highest = max(self._highest, _resident_bytes())

    @property
    def extra_bytes(self) -> int:
        return self._highest - self._before


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def show(results: dict[str, dict[str, Any]], sizes: tuple[int, int, int]) -> None:
    vocab, hidden, num_tokens = sizes
    logits_bytes = 4 * vocab * num_tokens
    table = Table("objective", "MiB", "full MiB", "of logits", "time / full", "error", box=None)
    figures: dict[str, Any] = {}
    for objective, result in results.items():
        extra, full = (max(run["extra_bytes"] for run in result[way]) for way in ("chunked", "full"))
        times = [ours["wall_s"] / other["wall_s"] for ours, other in zip(*(result[w] for w in WAYS[::-1]), strict=True)]
        share = extra / logits_bytes
        figures[objective] = {"memory_ratio": share, "time_ratios": times, "gradient_error": result["error"]}
        spread = f"{statistics.median(times):.2f}" + (
            f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 else ""
        )
        numbers = f"{extra / 2**20:.0f}", f"{full / 2**20:.0f}", f"{share:.3f}", spread, f"{result['error']:.1e}"
        table.add_row(objective, *numbers)
    Console().print(
        f"vocabulary {vocab:,}, {hidden} channels, {num_tokens:,} tokens; logits {logits_bytes / 2**20:.0f} MiB"
    )
    Console().print(table)
    print(
        json.dumps(
            {
                "benchmark": "loss_head",
                "ratio": max(figure["memory_ratio"] for figure in figures.values()),
                "bound_ratio": BOUND_MEMORY,
                "gradient_error": max(figure["gradient_error"] for figure in figures.values()),
                "bound_gradient_error": BOUND_ERROR,
                "objectives": figures,
                "runs": results,
            }
        )
    )


if __name__ == "__main__":
    main()
