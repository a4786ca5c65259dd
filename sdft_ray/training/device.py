"""What the device under a training process can do, and how much of its memory was taken."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from sdft_ray.training.schedule import Precision

BF16_PEAKS = {
    r"A100\b(?!.*MIG).*": 312e12,
    r"A30": 165e12,
    r"A10": 125e12,
    r"L4": 121e12,
    r"L40": 181e12,
    r"L40S": 362e12,
    r"H100 PCIe": 756e12,
    r"H100 \d+GB HBM3": 989e12,
    r"H200": 989e12,
    r"GH200 \d+GB": 989e12,
    r"B200": 2250e12,
}
"""Dense bfloat16 operations per second by the name that torch gives NVIDIA's devices, from their data sheets."""

_BURST_S = 0.2
_SMALLEST, _LARGEST = 256, 4096
_TRIES = 3


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Operations per second that one device can do at most: from its data sheet, or as measured here.

    Measured is the fastest of some square matrix products in the dtype of `precision`, once per process: on CPUs
    (with the threads that torch has here), in float32 (which may run as TF32), and on devices not in `BF16_PEAKS`.
    """
    if device.type == "cuda" and precision == "bf16":
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _measured(device, dtype, torch.get_num_threads())


def known_peak(name: str) -> float | None:
    """The data sheet's figure for a device by its name; None for one that is not in the table."""
    plain = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in BF16_PEAKS.items() if re.fullmatch(pattern, plain)), None)


@lru_cache
@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    del num_threads  # another number of threads is another device
    best, size, spent_s = 0.0, _SMALLEST, 0.0
    generator = torch.Generator(device).manual_seed(0)
    while size <= _LARGEST:
        matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
        times_s = [_product_s(matrix) for _ in range(1 + _TRIES)][1:]
        best = max(best, 2 * size**3 / min(times_s))
        spent_s += (1 + _TRIES) * min(times_s)
        if spent_s + 8 * (1 + _TRIES) * min(times_s) > _BURST_S:
            break
        size *= 2
    return best


def _product_s(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started


class PeakMemory:
    """Most memory taken since this was made: a GPU's by torch's tensors, on CPUs what is resident of this process.

    Where the system does not forget a process's high-water mark (not Linux), it is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the high-water mark

    def num_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
