"""What each training step cost: tokens per second, model FLOPs utilisation, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sdft_ray.data.packing import PackedRows
from sdft_ray.training.device import PeakMemory, peak_flops
from sdft_ray.training.flops import training_flops
from sdft_ray.training.losses import Teacher
from sdft_ray.training.plan import StepRecord, TrainPlan


class StepMeter:
    """Completes the records of one training run. Make it when `model` is ready to train: it may take 0.3 s.

    MFU is the FLOPs that the step's documents need (`flops.StepFlops`) per second of wall time, as a fraction of the
    peak of all `world_size` devices, taken to be like this one (arXiv:2204.02311, appendix B).
    """

    def __init__(self, model: Any, rows: PackedRows, plan: TrainPlan, teacher: Teacher | None, world_size: int) -> None:
        device = next(model.parameters()).device
        self._rows = rows
        self._flops = training_flops(model, plan.objective, teacher.model if teacher else None)
        self._peak_flops = peak_flops(device, plan.precision) * world_size
        self._memory = PeakMemory(device)

    def completed(self, record: StepRecord, indices_G: np.ndarray) -> StepRecord:
        """The record of a step over the rows `indices_G`, with its cost."""
        positions_N = self._rows.position_ids_NT[indices_G][self._rows.segment_ids_NT[indices_G] > 0]
        flops = self._flops.of(record.num_tokens, record.num_loss_tokens, positions_N)
        return replace(
            record,
            tokens_per_s=record.num_tokens / record.wall_s,
            mfu=flops / record.wall_s / self._peak_flops,
            peak_memory_bytes=self._memory.num_bytes(),
        )
