"""What a model loses on rows that it was not trained on."""

from __future__ import annotations

import math
from typing import Any

from sdft_ray.data.packing import PackedRows
from sdft_ray.errors import DivergenceError
from sdft_ray.training.loop import mean_loss
from sdft_ray.training.parallel import Parallel
from sdft_ray.training.schedule import Precision


def held_out_loss(
    model: Any,
    rows: PackedRows,
    *,
    parallel: Parallel | None = None,
    micro_batch_rows: int = 8,
    precision: Precision = "fp32",
) -> float:
    """`loop.mean_loss` of held-out rows. Raises as that does, and `DivergenceError` when the mean is not finite."""
    mean = mean_loss(model, rows, parallel=parallel, micro_batch_rows=micro_batch_rows, precision=precision)
    if not math.isfinite(mean):
        raise DivergenceError(f"training diverged: the held-out loss is {mean}", "lower the learning rate")
    return mean
