"""The held-out loss: the loop's own mean loss, however many processes share it; a lost model is told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.errors import DataError, DivergenceError
from sdft_ray.training.held_out import held_out_loss
from sdft_ray.training.loop import mean_loss
from tests.support.tiny import build_model
from tests.unit.training.test_parallel import Threads


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    """Seven rows: two and three processes have unequal shares of them."""
    rng = np.random.default_rng(1)
    documents = [
        Document(rng.integers(0, 128, n).tolist(), [i >= n // 2 for i in range(n)])
        for n in (20, 18, 30, 25, 17, 22, 28)
    ]
    packed = pack(documents, 32)
    assert packed.num_rows == 7
    return packed


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_rows", [1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_it_is_the_mean_over_all_response_tokens_on_every_process(
    rows: PackedRows, world_size: int, micro_batch_rows: int
) -> None:
    expected = mean_loss(build_model(num_blocks=2), rows)
    shared: list[Any] = [None] * world_size
    barrier = Barrier(world_size)
    models = [build_model(num_blocks=2) for _ in range(world_size)]
    passes = [0] * world_size

    def rank(index: int) -> float:
        def count(*_: Any) -> None:
            passes[index] += 1

        models[index].get_decoder().register_forward_hook(count)
        ranks = Threads(index, shared, barrier)
        return held_out_loss(models[index], rows, parallel=ranks, micro_batch_rows=micro_batch_rows)

    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(rank, range(world_size)))
    assert found == pytest.approx([expected] * world_size, rel=1e-5)
    assert len(set(found)) == 1
    assert len(set(passes)) == 1, "sharded models need equally many passes"


def test_bfloat16_is_near_and_the_mode_is_kept(rows: PackedRows) -> None:
    model = build_model(num_blocks=2).train()
    assert held_out_loss(model, rows, precision="bf16") == pytest.approx(held_out_loss(model, rows), rel=0.02)
    assert model.training


def test_a_model_that_is_lost_is_told(rows: PackedRows) -> None:
    model = build_model(num_blocks=2)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError, match="held-out loss is nan"):
        held_out_loss(model, rows)
    with pytest.raises(DataError, match="no token"):
        held_out_loss(model, pack([Document([1, 2], [True, False])], 4))
