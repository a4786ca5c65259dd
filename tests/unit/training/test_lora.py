"""Adapters: nothing at first, the same model after folding, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.errors import ModelError
from sdft_ray.models.families import FAMILIES
from sdft_ray.models.loading import load_model
from sdft_ray.training.loop import TrainPlan, train
from sdft_ray.training.lora import attach, merged
from tests.support.tiny import build_model

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    return pack([Document(list(range(i, i + 12)), [False] * 6 + [True] * 6) for i in range(8)], 24)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_start_as_identity_and_fold_into_equal_weights(family: str, rows: PackedRows, tmp_path: Path):
    targets = FAMILIES[family].lora_targets
    plain: Any = build_model(family, num_blocks=2)
    names = [name for name, _ in plain.named_parameters()]
    before = logits(plain)
    adapted = attach(plain, 4, 8.0, 0.0, targets).eval()
    assert torch.equal(logits(adapted), before)
    train(adapted, rows, TrainPlan(num_steps=3, rows_per_step=4, learning_rate=1e-2))
    trained = logits(adapted)
    assert (trained - before).abs().max() > 1e-2
    folded = merged(adapted)
    torch.testing.assert_close(logits(folded), trained, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in folded.named_parameters()] == names
    assert type(folded) is type(build_model(family, num_blocks=2))
    folded.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, "float32")), logits(folded))


def test_only_the_named_maps_are_adapted():
    model = attach(build_model("llama", num_blocks=2), 4, 8.0, 0.0, ["q_proj", "down_proj"])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2  # blocks, maps, A and B
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trainable)
    assert {p.shape[0] for name, p in trainable.items() if "lora_A" in name} == {4}


def test_the_update_is_scaled_by_alpha_over_rank():
    model = attach(build_model("llama", num_blocks=2), 4, 10.0, 0.0, ["o_proj"])
    base = model.get_base_model().model.layers[0].self_attn.o_proj
    with torch.no_grad():
        base.lora_B["default"].weight.normal_()
    a_RD, b_DR = base.lora_A["default"].weight.detach(), base.lora_B["default"].weight.detach()
    expected = base.base_layer.weight.detach() + 2.5 * b_DR @ a_RD
    folded = merged(model).model.layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(folded.detach(), expected)


def test_initial_adapters_depend_on_the_seed_alone():
    def initial(seed: int) -> torch.Tensor:
        model = attach(build_model("llama", num_blocks=2), 4, 8.0, 0.0, ["q_proj"], seed=seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(1)
    first = initial(0)
    torch.manual_seed(2)
    assert torch.equal(initial(0), first)
    assert not torch.equal(initial(1), first)


def test_a_target_that_no_module_has_is_refused():
    with pytest.raises(ModelError, match="no module 'qkv_proj'"):
        attach(build_model("llama", num_blocks=2), 4, 8.0, 0.0, ["q_proj", "qkv_proj"])


def test_a_plain_model_is_returned_as_it_is():
    model = build_model("llama", num_blocks=2)
    assert merged(model) is model
