"""What is tuned changes, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, pack
from sdft_ray.errors import ModelError
from sdft_ray.training.loop import TrainPlan, train
from sdft_ray.training.tail import tune_tail
from tests.support.tiny import build_model


@pytest.mark.parametrize("tied", [True, False])
def test_only_head_norm_and_last_blocks_change(tied: bool) -> None:
    model: Any = build_model("llama", num_blocks=3, tied=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = pack([Document(list(range(10, 30)), [True] * 20)], 24)
    train(tune_tail(model, 1), rows, TrainPlan(num_steps=2, rows_per_step=1, learning_rate=1e-2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    last = {name for name in before if name.startswith("model.layers.2.")}
    assert changed == last | {"model.norm.weight", head}


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(ModelError, match="3 blocks, but 4 are to be trained"):
        tune_tail(build_model("llama", num_blocks=3), 4)
