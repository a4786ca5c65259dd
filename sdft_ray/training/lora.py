"""Low-rank adapters (arXiv:2106.09685) through peft, and back to plain weights.

model = attach(model, rank=8, alpha=16.0, dropout=0.0, targets=family.lora_targets)
train(model, rows, plan)
model = merged(model)                   # a plain transformers model again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sdft_ray.errors import ModelError


def attach(model: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str], *, seed: int = 0) -> Any:
    """Freeze `model` and add adapters to every linear map whose module name ends in one of `targets`.

    The update of a weight is `alpha / rank * B @ A` with B zero at first, so nothing changes until training
    does. Adapters are float32. `model` is changed in place; use the returned one. Raises `ModelError` if a target
    names no module.
    """
    endings = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    missing = [target for target in targets if target not in endings]
    if missing or not targets:
        raise ModelError(
            f"the model has no module {missing[0]!r}" if missing else "no modules are given for the adapters",
            "give linear layers of its blocks",
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (peft says int, and divides)
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The plain model with the adapters folded into its weights; a model without adapters is returned as it is.

    The sum is rounded once to the dtype of the weights.
    """
    if not isinstance(model, PeftModel):
        return model
    plain: Any = model.merge_and_unload()
    return plain.requires_grad_(True)
