"""What one GPU does with measuring, losses and training, and whether its memory was predicted.

    python jobs/bench/gpu.py [--quick] [--blocks 8]
    python jobs/bench/gpu.py --cpu --tiny          the same code on a CPU, in seconds

Blocks in the shape of Llama-3.1-8B with random weights, in bfloat16. Needs torch, transformers, safetensors, numpy,
pydantic and PyYAML, and no installation of this package: neither Ray, vLLM nor Arrow is imported. Without a GPU it
says so and ends well.

- `measuring`: tokens per second of `importance.depth.measure`, and of the plain forward pass without the head.
- `losses`: one forward and backward pass through a head of 128,256 tokens, in chunks against all logits at once: time,
  memory beside the gradients as a share of the float32 logits, and the largest relative difference of a gradient.
- `training`: the training loop with and without activation checkpointing: tokens per second, memory, and MFU, which is
  the share of the dense bfloat16 rate in the card's data sheet (`training.device.BF16_PEAKS`; none for other cards),
  and beside it the share of what 8192 x 8192 products reach here.
- `prediction`: predicted over measured peak memory of training, where a function that predicts is given to `main`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # works without an installation

import torch
import transformers

from jobs.bench.support.training_gpu import (
    Sizes,
    data_sheet_flops_per_s,
    eight_billion,
    matmul_flops_per_s,
    random_rows,
    training,
    wait,
)
from sdft_ray.importance.depth import measure
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.device import PeakMemory
from sdft_ray.training.head import head_loss
from sdft_ray.training.objective import TeacherOutputs, chunk_loss

Predict = Callable[[Sizes, bool], int]
"""From a stack and whether activations are recomputed to the peak memory of a training process, in bytes."""
BOUND_MFU = 0.5
BOUND_MEASURING = 1.05
BYTES_PER_WEIGHT = 24
"""Float32 master, gradient and two moments, bfloat16 weight and gradient, and as much again for activations."""
OBJECTIVES = ("cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon")
HEAD = (128_256, 4096, 4096)
TINY_HEAD = (512, 32, 48)
"""Tokens of the vocabulary, hidden channels, response tokens."""
TINY = Sizes(
    {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1,
        "max_position_embeddings": 128,
    },
    row_tokens=64, rows_per_step=4, shortest=8, longest=32, warmup_steps=1, timed_steps=2, matrix=64,
)  # fmt: skip

Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None, predict: Predict | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of each part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, help="of the stack; default: as many as fit, at most 8")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, to see that all of it works")
    parser.add_argument("--tiny", action="store_true", help="two narrow blocks instead of those of an 8B model")
    options = parser.parse_args(argv)
    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        end("there is no GPU that torch can use, so nothing was measured", None)
        return
    sizes = TINY if options.tiny else stack_that_fits(options.blocks, device)
    if sizes is None:
        end(f"{card(device)['name']} has no room to train one block of an 8B model", card(device))
        return
    rounds = 1 if options.quick or options.tiny else options.rounds
    figures: Figures = {"card": card(device), "num_blocks": sizes.config["num_hidden_layers"]}
    rate = matmul_flops_per_s(device, sizes.matrix)
    sheet = data_sheet_flops_per_s(device)
    figures |= {"matmul_flops_per_s": rate, "data_sheet_flops_per_s": sheet}
    figures["measuring"] = measuring(sizes, device, rounds)
    free(device)
    figures["losses"] = losses(TINY_HEAD if options.tiny else HEAD, device, rounds)
    figures["training"] = {}
    for recomputes in (False, True):
        run: Figures = {**training(sizes, device, activation_checkpointing=recomputes)}
        run["share_of_matmul"] = run["flops_per_s"] / rate
        run["mfu"] = run["flops_per_s"] / sheet if sheet else None
        run["predicted_over_measured"] = predict(sizes, recomputes) / run["peak_bytes"] if predict else None
        figures["training"]["recomputed" if recomputes else "kept"] = run
        free(device)
    show(figures)
    reason = "figures of a CPU say nothing about a GPU" if options.cpu else ""
    report(figures, None if options.cpu else figures["training"]["kept"]["mfu"], reason)


def stack_that_fits(num_blocks: int | None, device: str) -> Sizes | None:
    """As many blocks as asked for, or as can be trained in the memory that is free; None where not one can."""
    if num_blocks is not None:
        return eight_billion(num_blocks)
    if device == "cpu":
        return eight_billion(1)
    room, _ = torch.cuda.mem_get_info()
    return next(
        (sizes for sizes in map(eight_billion, (8, 4, 2, 1)) if num_weights(sizes) * BYTES_PER_WEIGHT <= room), None
    )


def num_weights(sizes: Sizes) -> int:
    return sum(parameter.numel() for parameter in sizes.fresh("meta").parameters())


def card(device: str) -> Figures:
    """What the figures belong to."""
    facts: Figures = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cpu":
        return {"name": f"CPU, {torch.get_num_threads()} threads", **facts}
    major, minor = torch.cuda.get_device_capability()
    facts |= {"cuda": torch.version.cuda, "driver": driver(), "compute_capability": f"{major}.{minor}"}
    return {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.mem_get_info()[1], **facts}


def driver() -> str:
    """Version of the card's driver; "" where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return lines[0] if lines else ""
    return ""


def measuring(sizes: Sizes, device: str, rounds: int) -> Figures:
    """`measure` and the plain forward pass, in turns on the same rows; a ratio is one of times."""
    model = sizes.fresh(device).to(torch.bfloat16).eval()
    ids_BT = torch.from_numpy(random_rows(sizes).input_ids_NT[: sizes.rows_per_step]).long()
    batches = [(ids_BT, torch.ones_like(ids_BT))]

    @torch.inference_mode()
    def plain() -> None:
        for part_BT in ids_BT.split(sizes.micro_batch_rows):
            model.get_decoder()(input_ids=part_BT.to(device), use_cache=False)

    ways: dict[str, Callable[[], Any]] = {"measure": lambda: measure(model, batches), "forward": plain}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(ways[name], device))
    return {
        "tokens_per_s": ids_BT.numel() / statistics.median(times["measure"]),
        "ratio": statistics.median(ours / bare for ours, bare in zip(times["measure"], times["forward"], strict=True)),
        "bound_ratio": BOUND_MEASURING,
    }


def losses(head: tuple[int, int, int], device: str, rounds: int) -> Figures:
    """By objective: time and extra memory of the pass in chunks, relative to all logits at once."""
    results = {}
    for objective in OBJECTIVES:
        results[objective] = one_loss(head, objective, device, rounds)
        free(device)
    return results


def one_loss(head: tuple[int, int, int], objective: str, device: str, rounds: int) -> Figures:
    step = one_pass(head, objective, device)
    pairs = list(zip(step("chunked"), step("whole"), strict=True))
    error = max(float((ours - whole).abs().max() / whole.abs().max()) for ours, whole in pairs)
    left_bytes = sum(ours.numel() * ours.element_size() for ours, _ in pairs)
    del pairs
    free(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    peak = PeakMemory(torch.device(device))
    chunked_s = statistics.median(seconds(lambda: step("chunked"), device) for _ in range(rounds))
    extra_bytes = peak.num_bytes() - before - left_bytes
    whole_s = statistics.median(seconds(lambda: step("whole"), device) for _ in range(rounds))
    return {
        "time_ratio": chunked_s / whole_s,
        "tokens_per_s": head[2] / chunked_s,
        "error": error,
        "memory_of_logits": extra_bytes / (4 * head[0] * head[2]) if device == "cuda" else None,
    }


def one_pass(head: tuple[int, int, int], objective: str, device: str) -> Callable[[str], list[torch.Tensor]]:
    """A function that makes one pass in a way and returns the gradients of hidden states and head."""
    vocab, hidden, num_tokens = head
    torch.manual_seed(0)
    with torch.device(device):
        student, teacher = (torch.nn.Linear(hidden, vocab, bias=False, dtype=torch.bfloat16) for _ in range(2))
        hidden_ND, teacher_ND = torch.randn(2, num_tokens, hidden, dtype=torch.bfloat16)
        targets_N = torch.randint(vocab, (num_tokens,))
    hidden_ND = hidden_ND.detach().requires_grad_()
    outputs = TeacherOutputs(teacher_ND, teacher.requires_grad_(False), None)
    terms: dict[str, Any] = {"cross_entropy": 0.0, objective: 1.0}

    def step(way: str) -> list[torch.Tensor]:
        loss_of = chunk_loss(Objective(**terms), targets_N, outputs, {}, None)
        most = num_tokens * vocab // (1 if way == "whole" else 8)
        loss = head_loss(hidden_ND, student, loss_of, max_logits=most) / num_tokens
        return list(torch.autograd.grad(loss, [hidden_ND, student.weight]))

    return step


def seconds(work: Callable[[], Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def free(device: str) -> None:
    """Give back what no longer has a name."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def show(figures: Figures) -> None:
    """For people; the last line is for machines."""
    named, sheet = figures["card"], figures["data_sheet_flops_per_s"]
    print(f"{named['name']}, " + ", ".join(f"{key} {value}" for key, value in named.items() if key != "name"))
    print(f"products of square matrices: {figures['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s", end="")
    print(f", data sheet {sheet / 1e12:.0f}" if sheet else "; no data sheet is known for it, so there is no MFU")
    part = figures["measuring"]
    print(f"measuring: {part['tokens_per_s']:,.0f} tokens/s, {part['ratio']:.3f} x the time of a forward pass")
    for objective, loss in figures["losses"].items():
        memory = loss["memory_of_logits"]
        taken = "" if memory is None else f", {memory:.3f} of the logits' memory"
        print(f"{objective}: {loss['time_ratio']:.2f} x the time{taken}, gradients within {loss['error']:.1e}")
    for name, run in figures["training"].items():
        mfu = "" if run["mfu"] is None else f"MFU {100 * run['mfu']:.1f} %, "
        ratio = run["predicted_over_measured"]
        predicted = "no prediction" if ratio is None else f"predicted {ratio:.2f} x"
        print(
            f"training, activations {name}: {run['tokens_per_s']:,.0f} tokens/s, {mfu}"
            f"{100 * run['share_of_matmul']:.1f} % of the products, {run['peak_bytes'] / 2**30:.2f} GiB ({predicted})"
        )


def end(reason: str, named: Figures | None) -> None:
    """Nothing could be measured."""
    print(f"{reason[0].upper()}{reason[1:]}.")
    report({"card": named}, None, reason)


def report(figures: Figures, ratio: float | None, reason: str) -> None:
    print(json.dumps({"benchmark": "gpu", "ratio": ratio, "reason": reason, "bound_ratio": BOUND_MFU, **figures}))


if __name__ == "__main__":
    main()
