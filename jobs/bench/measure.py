"""What measuring costs beside a plain forward pass, and how much memory it adds to the model.

    python jobs/bench/measure.py [--quick]

Three arms take turns on the same batches: `measure`; the plain forward pass of the stock causal LM, as a user
would run it (under inference mode, no key-value cache); and the same without its LM head, which is the harder
peer because `measure` does not compute the head either. A ratio is taken inside each round; the table shows
medians and extremes, and beside the wall clock the same ratio in CPU seconds, which other processes disturb
less. Memory is the peak resident size above the loaded model, in a process of its own. One thread, as in a Ray
task that holds one CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdft_ray.importance.depth import measure

BOUND_RATIO, BOUND_MIB = 1.05, 200.0

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A random Llama, and calibration rows of evenly spread lengths, batched as calibration does it."""

    config: dict[str, int]
    shortest: int
    longest: int
    timed_tokens: int
    rounds: int
    quick_tokens: int
    quick_rounds: int


BATCH_TOKENS = 4096
"""Positions in a batch where memory is measured: the default of `Resources.measure.batch_tokens`."""

LABORATORY = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 2}
LARGER = {"num_hidden_layers": 16, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
CASES = {
    "laboratory: 12 blocks, hidden 128": Case(LABORATORY | {"vocab_size": 1200}, 40, 140, 4096, 21, 4096, 5),
    "larger: 16 blocks, hidden 512": Case(LARGER | {"vocab_size": 8192}, 100, 300, 2048, 7, 512, 3),
}


def build(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**case.config, tie_word_embeddings=True)).eval()  # type: ignore[arg-type]


def make_batches(case: Case, batch_tokens: int) -> list[Batch]:
    """Right-padded rows, sorted by length, at most `batch_tokens` positions a batch."""
    generator = torch.Generator().manual_seed(0)
    num_rows = max(2, 2 * batch_tokens // (case.shortest + case.longest))
    lengths = torch.linspace(case.shortest, case.longest, num_rows).long().tolist()
    groups: list[list[int]] = [[]]
    for length in lengths:
        if (len(groups[-1]) + 1) * length > batch_tokens:
            groups.append([])
        groups[-1].append(length)
    batches: list[Batch] = []
    for group in groups:
        mask = (torch.arange(max(group)) < torch.tensor(group)[:, None]).long()
        batches.append((torch.randint(case.config["vocab_size"], mask.shape, generator=generator) * mask, mask))
    return batches


def arms(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Callable[[], Any]]:
    def plain(module: torch.nn.Module) -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                module(input_ids=ids, attention_mask=mask, use_cache=False)

    return {
        "measure": lambda: measure(model, batches),
        "causal_lm": lambda: plain(model),
        "backbone": lambda: plain(model.base_model),
    }


def time_rounds(case: Case, *, rounds: int, batch_tokens: int) -> dict[str, Any]:
    """Medians over rounds; the arm that starts changes from round to round."""
    batches = make_batches(case, batch_tokens)
    runs = arms(build(case), batches)
    names = list(runs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            start, start_cpu = time.perf_counter(), time.process_time()
            runs[name]()
            if turn:  # the first round warms up
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    figures: dict[str, Any] = {"num_tokens": sum(int(mask.sum()) for _, mask in batches)}
    figures |= {f"{name}_s": statistics.median(values) for name, values in wall.items()}
    for peer in ("causal_lm", "backbone"):
        ratios = [ours / theirs for ours, theirs in zip(wall["measure"], wall[peer], strict=True)]
        figures[f"ratio_to_{peer}"] = statistics.median(ratios)
        figures[f"ratio_to_{peer}_spread"] = [min(ratios), max(ratios)]
        cpu_ratios = [ours / theirs for ours, theirs in zip(cpu["measure"], cpu[peer], strict=True)]
        figures[f"cpu_ratio_to_{peer}"] = statistics.median(cpu_ratios)
    return figures


def status_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def added_memory(case: Case, arm: str) -> float:
    """MiB that one arm adds at its peak to a process that holds the model. Linux only."""
    batches = make_batches(case, BATCH_TOKENS)
    run = arms(build(case), batches)[arm]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = status_mib("VmRSS")
    run()
    return status_mib("VmHWM") - before


def added_memory_apart(name: str, arm: str) -> float:
    command = [sys.executable, __file__, "--memory-of", name, arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def show(console: Console, name: str, figures: dict[str, Any]) -> None:
    rate = figures["num_tokens"] / figures["measure_s"]
    table = Table(title=f"{name} ({figures['num_tokens']:,} tokens, {rate:,.0f} tokens/s)", title_justify="left")
    for column in ("forward of", "wall", "measure / it", "spread", "in CPU s", "adds"):
        table.add_column(column, justify="left" if column == "forward of" else "right")
    memory = figures["added_memory_mib"]
    for peer, label in (("causal_lm", "causal LM"), ("backbone", "backbone")):
        low, high = figures[f"ratio_to_{peer}_spread"]
        table.add_row(
            label,
            f"{figures[f'{peer}_s']:.3f} s",
            f"{figures[f'ratio_to_{peer}']:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{figures[f'cpu_ratio_to_{peer}']:.3f}",
            f"{memory[peer]:.0f} MiB" if peer in memory else "",
        )
    table.add_row("measure", f"{figures['measure_s']:.3f} s", "", "", "", f"{memory['measure']:.0f} MiB")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens: under 60 s")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        name, arm = options.memory_of
        print(added_memory(CASES[name], arm))
        return
    console = Console()
    models: dict[str, Any] = {}
    for name, case in CASES.items():
        if options.quick:
            figures = time_rounds(case, rounds=case.quick_rounds, batch_tokens=case.quick_tokens)
        else:
            figures = time_rounds(case, rounds=case.rounds, batch_tokens=case.timed_tokens)
        peers = ("measure",) if options.quick else ("measure", "causal_lm")
        figures["added_memory_mib"] = {arm: added_memory_apart(name, arm) for arm in peers}
        show(console, name, figures)
        models[name] = figures
    ratio = max(figures["ratio_to_causal_lm"] for figures in models.values())
    memory = max(figures["added_memory_mib"]["measure"] for figures in models.values())
    console.print(f"Bounds: {BOUND_RATIO} of the causal LM forward, {BOUND_MIB:.0f} MiB added to the model.")
    summary = {
        "benchmark": "measure",
        "ratio": ratio,
        "ratio_to_backbone": max(figures["ratio_to_backbone"] for figures in models.values()),
        "cpu_ratio": max(figures["cpu_ratio_to_causal_lm"] for figures in models.values()),
        "added_memory_mib": memory,
        "within_bounds": ratio <= BOUND_RATIO and memory <= BOUND_MIB,
        "models": models,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
