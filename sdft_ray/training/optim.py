"""Optimizers over named float32 parameters, with peak learning rates that a schedule scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sdft_ray.errors import ResourceError
from sdft_ray.training.schedule import OptimizerKind


def build_optimizer(
    model: Any,
    kind: OptimizerKind,
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    adamw_learning_rate: float | None = None,
    parameters: Mapping[str, nn.Parameter] | None = None,
    in_parts: bool = False,
) -> list[torch.optim.Optimizer]:
    """Optimizers that together cover every trainable parameter of `model`, each exactly once.

    `adamw` (arXiv:1711.05101) decays matrices only, not norms and biases. `muon` (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; update scaled by sqrt(max(1, rows/columns))) takes the matrices of the
    blocks with `learning_rate` and `weight_decay`; embeddings, head, norms and biases get AdamW without decay at
    `adamw_learning_rate` (default: `learning_rate`). `parameters` replaces the model's own trainable
    parameters by others of the same names, such as float32 masters. `in_parts` says that they are rows of the whole:
    AdamW does not mind, but Muon orthogonalizes whole matrices, and then `ResourceError` is raised.

    Each parameter group keeps its own rate as `peak`: see `scale_learning_rates`.
    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if kind == "muon" and in_parts:
        raise ResourceError(
            "muon needs whole matrices, but each worker holds a part of them", "use strategy: ddp, or optimizer: adamw"
        )
    if kind == "adamw":
        groups = [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers = [_adamw(groups, learning_rate, betas)]
    else:
        matrix_names = block_matrix_names(model)
        matrices = [p for name, p in parameters.items() if name in matrix_names]
        rest = [p for name, p in parameters.items() if name not in matrix_names]
        optimizers = []
        if matrices:
            optimizers.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, momentum=0.95))
        if rest:
            groups = [{"params": rest, "weight_decay": 0.0}]
            optimizers.append(_adamw(groups, adamw_learning_rate or learning_rate, betas))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _adamw(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=True)


def block_matrix_names(model: Any) -> set[str]:
    """Names of the 2-D parameters that are neither an embedding nor the head."""
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in outside}


def scale_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` (in [0, 1]) times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
