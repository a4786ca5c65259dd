"""The cost of a step: its parts against what is known, and a whole run on this machine."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.training import device
from sdft_ray.training.device import PeakMemory, known_peak, peak_flops
from sdft_ray.training.flops import training_flops
from sdft_ray.training.loop import StepRecord, TrainPlan, rows_of_step, train
from sdft_ray.training.meter import StepMeter
from tests.support.tiny import build_model

CPU = torch.device("cpu")
LENGTHS = (5, 9, 12, 3, 16, 7)
PLAN = TrainPlan(num_steps=3, rows_per_step=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    return pack([Document([7] * n, [i >= n // 2 for i in range(n)]) for n in LENGTHS], 16)


def record_of(rows: PackedRows, indices: np.ndarray, wall_s: float) -> StepRecord:
    return StepRecord(
        step=1,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        num_tokens=int(np.count_nonzero(rows.segment_ids_NT[indices])),
        num_loss_tokens=int(np.count_nonzero(rows.loss_mask_NT[indices])),
        wall_s=wall_s,
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_mfu_is_what_the_documents_need_over_what_the_devices_can(family: str, rows: PackedRows) -> None:
    """All rows at once, so that the documents are known: padding and borders between them must not count."""
    model: Any = build_model(family, num_blocks=2)
    indices = np.arange(rows.num_rows)
    record = record_of(rows, indices, wall_s=0.25)
    found = StepMeter(model, rows, PLAN, None, 4).completed(record, indices)
    flops = training_flops(model, PLAN.objective)
    pairs: dict[int | None, int] = {None: sum(n * (n + 1) // 2 for n in LENGTHS)}
    pairs[8] = sum(min(i + 1, 8) for n in LENGTHS for i in range(n))
    needed = flops.per_token * sum(LENGTHS) + flops.per_loss_token * record.num_loss_tokens
    needed += sum(count * pairs[window] for window, count in flops.per_pair.items())
    assert found.mfu == pytest.approx(needed / 0.25 / (4 * peak_flops(CPU, "fp32")))
    assert found.tokens_per_s == sum(LENGTHS) / 0.25
    assert replace(found, tokens_per_s=None, mfu=None, peak_memory_bytes=None) == record


def test_every_record_of_a_training_says_what_it_cost(rows: PackedRows) -> None:
    records: list[StepRecord] = []
    train(build_model("llama", num_blocks=2), rows, PLAN, report=records.append)
    for record in records:
        assert record.tokens_per_s == pytest.approx(record.num_tokens / record.wall_s)
        assert record.mfu is not None
        assert 0 < record.mfu < 1
        assert record.peak_memory_bytes is not None
        assert record.peak_memory_bytes > 50 * 2**20, "torch alone is resident with more"
    peaks = [record.peak_memory_bytes for record in records if record.peak_memory_bytes]
    assert peaks == sorted(peaks)


def test_the_peak_of_this_cpu_is_measured_once_and_is_what_a_product_reaches() -> None:
    device._measured.cache_clear()
    started = time.perf_counter()
    peak = peak_flops(CPU, "fp32")
    assert time.perf_counter() - started < 3, "0.2 s on a machine of its own"
    matrix = torch.rand(512, 512)
    best_s = min(device._product_s(matrix) for _ in range(20))
    assert 0.3 < peak / (2 * 512**3 / best_s) < 5
    assert peak_flops(CPU, "fp32") == peak
    assert peak_flops(CPU, "bf16") != peak


def test_measuring_draws_no_random_number() -> None:
    device._measured.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    peak_flops(CPU, "fp32")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_data_sheets_by_name(name: str, tera: int | None) -> None:
    assert known_peak(name) == (None if tera is None else tera * 1e12)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process")
def test_peak_memory_forgets_what_was_before_and_sees_what_is_gone_again() -> None:
    size = 200 * 2**20
    first = bytearray(size)
    del first
    memory = PeakMemory(CPU)
    before = memory.num_bytes()
    second = bytearray(size)
    second[::4096] = b"x" * len(second[::4096])
    del second
    assert 0.9 * size < memory.num_bytes() - before < 1.2 * size


def test_metering_costs_next_to_nothing() -> None:
    """Of a step of 50 ms less than a hundredth, on rows as long as real ones."""
    rng = np.random.default_rng(0)
    rows = pack([Document(rng.integers(0, 128, n).tolist(), [True] * n) for n in rng.integers(20, 1024, 64)], 2048)
    plan = replace(PLAN, rows_per_step=8)
    meter = StepMeter(build_model("llama"), rows, plan, None, 1)
    record = record_of(rows, np.arange(8), 0.05)
    spent_s = []
    for step in range(50):
        started = time.perf_counter()
        meter.completed(record, rows_of_step(step % 4, rows.num_rows, 8, 0))
        spent_s.append(time.perf_counter() - started)
    assert min(spent_s) < 0.0005
