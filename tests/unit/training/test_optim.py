"""Which parameter gets which optimizer, rate and decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_ray.training.optim import block_matrix_names, build_optimizer, scale_learning_rates
from tests.support.tiny import FAMILIES, build_model


def settings_by_name(model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[str, float, float]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                assert names[id(param)] not in found, "a parameter has two optimizers"
                found[names[id(param)]] = (type(optimizer).__name__, group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_block_matrices_and_adamw_the_rest(family: str, tied: bool):
    model = build_model(family, num_blocks=2, tied=tied)
    optimizers = build_optimizer(model, "muon", 0.02, 0.05, adamw_learning_rate=4e-3)
    found = settings_by_name(model, optimizers)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        in_block = ".layers." in name and param.ndim == 2
        assert found[name] == (("Muon", 0.02, 0.05) if in_block else ("AdamW", 4e-3, 0.0)), name
    assert all(".layers." in name for name in block_matrix_names(model))


def test_adamw_decays_matrices_only():
    model = build_model("qwen2", num_blocks=2)
    found = settings_by_name(model, build_optimizer(model, "adamw", 1e-3, 0.1))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        assert found[name] == ("AdamW", 1e-3, 0.1 if param.ndim == 2 else 0.0), name


def test_frozen_parameters_are_left_out():
    model = build_model("llama", num_blocks=2)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    found = settings_by_name(model, build_optimizer(model, "muon", 0.02, adamw_learning_rate=1e-3))
    assert list(found) == ["model.embed_tokens.weight"]


def test_rates_are_scaled_from_their_peaks():
    model = build_model("llama", num_blocks=2)
    optimizers = build_optimizer(model, "muon", 0.02, adamw_learning_rate=4e-3)
    for factor in (0.5, 0.25):  # not compounded
        scale_learning_rates(optimizers, factor)
        rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert rates == {0.02 * factor, 4e-3 * factor}
