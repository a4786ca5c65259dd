"""How much of a GPU's matrix products training reaches, on blocks in the shape of Llama-3.1-8B with random weights.

Needs torch, transformers and numpy, and of this package only what needs no more.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.training.device import known_peak, peak_flops
from sdft_ray.training.loop import train
from sdft_ray.training.plan import StepRecord, TrainPlan

SHAPE = Path(__file__).parents[2] / "recipes" / "configs" / "llama31_8b_instruct.json"
MATRIX = 8192
PRODUCTS = 20


@dataclass(frozen=True)
class Sizes:
    """A stack of blocks, and how it is trained. `vocab` tokens: as many as give the head its share of the work."""

    config: dict[str, Any]
    row_tokens: int = 2048
    micro_batch_rows: int = 2
    rows_per_step: int = 16
    shortest: int = 100
    longest: int = 1000
    """Tokens of a document."""
    warmup_steps: int = 2
    timed_steps: int = 6
    matrix: int = MATRIX

    def fresh(self, device: str) -> Any:
        """The stack with random weights in float32."""
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**self.config))


def eight_billion(num_blocks: int = 8) -> Sizes:
    """Blocks of Llama-3.1-8B with as large a part of its vocabulary. Eight of them are 2 billion parameters: float32
    masters, gradients and moments fit one card of 80 GB."""
    config: dict[str, Any] = json.loads(SHAPE.read_text(encoding="utf-8"))
    vocab = -(-config["vocab_size"] * num_blocks // config["num_hidden_layers"] // 64) * 64
    return Sizes(
        config | {"num_hidden_layers": num_blocks, "vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1},
    )


def measure(device: str = "cuda") -> dict[str, float]:
    """Tokens per second of the loop in bfloat16 on eight blocks, and their share of the card's own rate."""
    sizes = eight_billion()
    rate = matmul_flops_per_s(device, sizes.matrix)
    figures = training(sizes, device)
    return {
        "tokens_per_s": figures["tokens_per_s"],
        "mfu": figures["flops_per_s"] / rate,
        "matmul_flops_per_s": rate,
    }


def training(sizes: Sizes, device: str, *, activation_checkpointing: bool = False) -> dict[str, float]:
    """Tokens of documents and their FLOPs per second, in bfloat16 with float32 masters, and the most memory in bytes.

    FLOPs are those that the documents need (`training.flops`): recomputed activations and padding count nothing.
    """
    model = sizes.fresh(device)
    records: list[StepRecord] = []
    plan = TrainPlan(
        num_steps=sizes.warmup_steps + sizes.timed_steps,
        rows_per_step=sizes.rows_per_step,
        learning_rate=1e-5,
        micro_batch_rows=sizes.micro_batch_rows,
        precision="bf16",
        activation_checkpointing=activation_checkpointing,
    )
    train(model, random_rows(sizes), plan, report=records.append)
    timed = records[sizes.warmup_steps :]
    wall_s = sum(record.wall_s for record in timed)
    mfu = statistics.fmean([record.mfu or 0.0 for record in timed])
    return {
        "tokens_per_s": sum(record.num_tokens for record in timed) / wall_s,
        "flops_per_s": mfu * peak_flops(torch.device(device), "bf16"),
        "peak_bytes": records[-1].peak_memory_bytes or 0,
        "loss": records[-1].loss,
    }


def random_rows(sizes: Sizes) -> PackedRows:
    """Documents of which the second half counts, enough for four steps."""
    rng = random.Random(0)
    mean = (sizes.shortest + sizes.longest) / 2
    number = int(4 * sizes.rows_per_step * sizes.row_tokens / mean)
    lengths = [rng.randint(sizes.shortest, sizes.longest) for _ in range(number)]
    texts = [[rng.randrange(sizes.config["vocab_size"]) for _ in range(length)] for length in lengths]
    documents = [Document(ids, [place >= len(ids) // 2 for place in range(len(ids))]) for ids in texts]
    return pack(documents, sizes.row_tokens)


def matmul_flops_per_s(device: str, matrix: int = MATRIX) -> float:
    """The best of several products of square bfloat16 matrices."""
    left, right = torch.randn(2, matrix, matrix, device=device, dtype=torch.bfloat16)
    best_s = float("inf")
    for _ in range(PRODUCTS):
        wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        wait(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * matrix**3 / best_s


def data_sheet_flops_per_s(device: str) -> float | None:
    """Dense bfloat16 products per second as the card's maker says; None on CPUs and for unknown cards."""
    return known_peak(torch.cuda.get_device_name()) if device == "cuda" else None


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
