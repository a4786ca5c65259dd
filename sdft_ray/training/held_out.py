"""What a model loses on rows that it was not trained on, shared by all processes of a training.

Suffixes: M rows of one process's micro-batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sdft_ray.data.packing import PackedRows, attention_inputs
from sdft_ray.errors import DataError, DivergenceError
from sdft_ray.training.losses import response_loss
from sdft_ray.training.parallel import Parallel, Single
from sdft_ray.training.schedule import Precision


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: PackedRows,
    *,
    parallel: Parallel | None = None,
    micro_batch_rows: int = 8,
    precision: Precision = "fp32",
) -> float:
    """Mean over all response tokens of -ln p, in nats per token, the same on every process.

    All processes call it, with the same rows; each scores its share, in equally many forward passes, as sharded models
    need. Raises `DataError` without response tokens and `DivergenceError` when the mean is not finite.
    """
    parallel = parallel or Single()
    if rows.num_loss_tokens == 0:
        raise DataError("no token of the held-out rows counts in the loss", "raise train.held_out")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    stride = parallel.world_size * micro_batch_rows
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, rows.num_rows, stride):
            mine_M = np.arange(start, min(start + stride, rows.num_rows))[parallel.rank :: parallel.world_size]
            shown_M = mine_M if len(mine_M) else np.array([0])  # nothing is left for this process: it keeps step
            mask_MT = torch.from_numpy(rows.loss_mask_NT[shown_M]).to(device)
            loss = response_loss(model, attention_inputs(rows, shown_M, device=device), mask_MT)
            total += loss if len(mine_M) else 0.0
    model.train(was_training)
    parallel.sum_(total)
    mean = total.item() / rows.num_loss_tokens
    if not math.isfinite(mean):
        raise DivergenceError(f"training diverged: the held-out loss is {mean}", "lower the learning rate")
    return mean
