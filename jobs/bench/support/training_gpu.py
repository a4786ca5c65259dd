"""How much of a GPU's matrix products training reaches, on blocks in the shape of Llama-3.1-8B with random weights."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.models.size import size_of
from sdft_ray.training.loop import train
from sdft_ray.training.plan import StepRecord, TrainPlan

SHAPE = Path(__file__).parents[2] / "recipes" / "configs" / "llama31_8b_instruct.json"
PART = {"num_hidden_layers": 8, "vocab_size": 32_064, "bos_token_id": 0, "eos_token_id": 1}
"""A quarter of the blocks and of the vocabulary: float32 masters, gradients and moments of 2 billion parameters fit one
card, and the head has the share of the work that it has in the whole model."""
ROW_TOKENS = 2048
MICRO_BATCH_ROWS = 2
ROWS_PER_STEP = 16
WARMUP_STEPS, TIMED_STEPS = 2, 6
MATRIX = 8192
PRODUCTS = 20


def measure(device: str = "cuda") -> dict[str, float]:
    """Tokens per second of the loop in bfloat16, and their share of the card's own rate.

    Counted is three times the forward pass's products of weights and tokens; attention scores are left out, so the
    share is, if anything, too low.
    """
    config: dict[str, Any] = json.loads(SHAPE.read_text(encoding="utf-8")) | PART
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config))
    records: list[StepRecord] = []
    plan = TrainPlan(
        num_steps=WARMUP_STEPS + TIMED_STEPS,
        rows_per_step=ROWS_PER_STEP,
        learning_rate=1e-5,
        micro_batch_rows=MICRO_BATCH_ROWS,
        precision="bf16",
    )
    train(model, random_rows(config["vocab_size"]), plan, report=records.append)
    timed = records[WARMUP_STEPS:]
    tokens_per_s = sum(record.num_tokens for record in timed) / sum(record.wall_s for record in timed)
    flops_per_s = 3 * size_of(config).matmul_flops_per_token * tokens_per_s
    del model
    rate = matmul_flops_per_s(device)
    return {"tokens_per_s": tokens_per_s, "mfu": flops_per_s / rate, "matmul_flops_per_s": rate}


def random_rows(vocab_size: int) -> PackedRows:
    """Documents of 100 to 1,000 tokens, of which the second half counts."""
    rng = random.Random(0)
    lengths = [rng.randrange(100, 1001) for _ in range(4 * ROWS_PER_STEP * ROW_TOKENS // 550)]
    texts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return pack([Document(ids, [place >= len(ids) // 2 for place in range(len(ids))]) for ids in texts], ROW_TOKENS)


def matmul_flops_per_s(device: str) -> float:
    """The best of several products of square bfloat16 matrices."""
    left, right = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    best_s = float("inf")
    for _ in range(PRODUCTS):
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * MATRIX**3 / best_s


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
