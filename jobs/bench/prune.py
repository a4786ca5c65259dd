"""What pruning costs beside copying the bytes that it keeps, and how much memory it takes.

    python jobs/bench/prune.py [--quick] [--width] [--gib 2] [--directory DIR]

A random half-precision Llama in several files loses a fifth of its blocks, or with `--width` a quarter of its hidden
channels, MLP channels and heads, taken out at random. Two arms take turns, each on files that the page cache holds and
to a new directory: `prune_checkpoint`, and a plain copy (`shutil.copyfile`) of files of the same size. Time ends when
the call returns; what is still to be written is flushed before the next round begins. A ratio is taken inside each
round; the table shows medians and extremes. Memory is the peak resident size above that of the process before
pruning, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from sdft_ray.models.channels import Channels
from sdft_ray.models.checkpoint import INDEX_FILE, Checkpoint
from sdft_ray.models.families import family_of, split_block
from sdft_ray.models.surgery import prune_checkpoint

BOUND_RATIO = 2.0
SHARD_BYTES = 2**29
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "dtype": "float16",
}


def make_model(directory: Path, model_bytes: int) -> None:
    """A random checkpoint of about `model_bytes`, tensors in the model's order, in files of SHARD_BYTES."""
    one = family_of(CONFIG).tensor_shapes(CONFIG)
    block_bytes = sum(2 * math.prod(shape) for name, shape in one.items() if split_block(name))
    outer_bytes = sum(2 * math.prod(shape) for name, shape in one.items() if not split_block(name))
    config = CONFIG | {"num_hidden_layers": max(5, (model_bytes - outer_bytes) // block_bytes)}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    part: dict[str, np.ndarray] = {}

    def flush() -> None:
        file_name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(part, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
        part.clear()

    for name, shape in family_of(config).tensor_shapes(config).items():
        if len(shape) == 1:  # norms are computed with, all others are only bytes
            part[name] = np.ones(shape, np.float16)
        else:
            part[name] = np.frombuffer(generator.bytes(2 * math.prod(shape)), np.float16).reshape(shape)
        if sum(array.nbytes for array in part.values()) >= SHARD_BYTES:
            flush()
    if part:
        flush()
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def kept_blocks(num_blocks: int) -> list[int]:
    """All but a fifth, taken out of the middle."""
    removed = range(num_blocks // 2, num_blocks // 2 + max(1, num_blocks // 5))
    return [block for block in range(num_blocks) if block not in removed]


@cache
def three_quarters(num_blocks: int) -> Channels:
    """Of every space, at random; three heads of each group of four. Chosen once: a plan is made before surgery."""
    rng = np.random.default_rng(0)

    def some(size: int) -> tuple[int, ...]:
        return tuple(sorted(rng.permutation(size)[: size * 3 // 4].tolist()))

    heads = [tuple(group * 4 + head for group in range(4) for head in some(4)) for _ in range(num_blocks)]
    mlp = [some(CONFIG["intermediate_size"]) for _ in range(num_blocks)]
    return Channels(hidden=some(CONFIG["hidden_size"]), mlp=tuple(mlp), heads=tuple(heads))


def prune(source: Path, target: Path, *, width: bool) -> None:
    num_blocks = Checkpoint.open(source).num_blocks
    keep = list(range(num_blocks)) if width else kept_blocks(num_blocks)
    channels = three_quarters(num_blocks) if width else Channels()
    prune_checkpoint(source, target, keep, channels, max_shard_bytes=SHARD_BYTES)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def time_rounds(
    arms: dict[str, Callable[[Path], None]], root: Path, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds per arm and round; the arm that starts changes, the first round warms up."""
    names = list(arms)
    wall: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            target = root / "target"
            os.sync()
            start, start_processor = time.perf_counter(), time.process_time()
            arms[name](target)
            if turn:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
            shutil.rmtree(target)
    return wall, processor


def added_memory(source: Path, target: Path, *, width: bool) -> int:
    """Bytes that pruning adds at its peak to this process. Linux only."""

    def status_bytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = status_bytes("VmRSS")
    prune(source, target, width=width)
    return status_bytes("VmHWM") - before


def added_memory_apart(source: Path, target: Path, *, width: bool) -> int:
    command = [sys.executable, __file__, "--memory-of", str(source), str(target), *(["--width"] if width else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(target)
    return int(done.stdout.strip().splitlines()[-1])


def measure(root: Path, model_bytes: int, rounds: int, *, width: bool) -> dict[str, Any]:
    source, kept = root / "source", root / "kept"
    make_model(source, model_bytes)
    prune(source, kept, width=width)  # the files that the other arm copies
    checkpoint, kept_bytes = Checkpoint.open(source), sum(path.stat().st_size for path in kept.iterdir())
    memory = added_memory_apart(source, root / "target", width=width)
    arms = {"prune": lambda target: prune(source, target, width=width), "copy": lambda target: copy(kept, target)}
    seconds, processor = time_rounds(arms, root, rounds)
    ratios = [ours / theirs for ours, theirs in zip(seconds["prune"], seconds["copy"], strict=True)]
    return {
        "model_bytes": checkpoint.nbytes,
        "kept_bytes": kept_bytes,
        "largest_tensor_bytes": max(info.nbytes for info in checkpoint.tensors.values()),
        "num_blocks": checkpoint.num_blocks,
        "num_kept_blocks": Checkpoint.open(kept).num_blocks,
        "rounds": rounds,
        **{f"{name}_s": statistics.median(values) for name, values in seconds.items()},
        **{f"{name}_s_spread": [min(values), max(values)] for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "processor_ratio": statistics.median(processor["prune"]) / statistics.median(processor["copy"]),
        "added_memory_bytes": memory,
    }


def show(console: Console, figures: dict[str, Any]) -> None:
    table = Table(
        title=f"{figures['model_bytes'] / 2**30:.2f} GiB, {figures['num_kept_blocks']} of "
        f"{figures['num_blocks']} blocks kept ({figures['kept_bytes'] / 2**30:.2f} GiB)",
        title_justify="left",
    )
    for column in ("arm", "wall", "spread", "rate", "prune / copy"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name in ("copy", "prune"):
        low, high = figures[f"{name}_s_spread"]
        rate = figures["kept_bytes"] / 2**30 / figures[f"{name}_s"]
        ratio = "{:.2f} ({:.2f} - {:.2f})".format(figures["ratio"], *figures["ratio_spread"])
        table.add_row(
            name,
            f"{figures[f'{name}_s']:.2f} s",
            f"{low:.2f} - {high:.2f} s",
            f"{rate:.2f} GiB/s",
            ratio if name == "prune" else "",
        )
    console.print(table)
    console.print(f"Processor time: {figures['processor_ratio']:.2f} times the copy's (steadier on a busy machine).")
    console.print(
        f"Pruning added {figures['added_memory_bytes'] / 2**20:.1f} MiB of memory; "
        f"the largest tensor has {figures['largest_tensor_bytes'] / 2**20:.1f} MiB."
    )
    console.print(f"Bounds: {BOUND_RATIO:.0f} times the copy; memory of the largest tensor.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of a GiB: under 60 s")
    parser.add_argument("--width", action="store_true", help="narrower, with all blocks")
    parser.add_argument("--gib", type=float, help="size of the model (2; with --quick 0.25)")
    parser.add_argument("--directory", type=Path, help="where to write, to measure another disk")
    parser.add_argument("--memory-of", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(added_memory(*(Path(path) for path in options.memory_of), width=options.width))
        return
    model_bytes = int((options.gib or (0.25 if options.quick else 2.0)) * 2**30)
    parent = options.directory or Path(tempfile.gettempdir())
    free = shutil.disk_usage(parent).free
    if free < 3 * model_bytes:
        sys.exit(f"{parent} has {free / 2**30:.1f} GiB free, {3 * model_bytes / 2**30:.1f} are needed")
    with tempfile.TemporaryDirectory(prefix="sdft-bench-", dir=parent) as root:
        figures = measure(Path(root), model_bytes, rounds=5, width=options.width)
    show(Console(), figures)
    within = figures["ratio"] <= BOUND_RATIO and figures["added_memory_bytes"] <= figures["largest_tensor_bytes"]
    print(json.dumps({"benchmark": "prune", "width": options.width, "within_bounds": within, **figures}))


if __name__ == "__main__":
    main()
