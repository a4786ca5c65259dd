"""What an interrupted training run needs to continue exactly: safetensors and JSON, no pickle.

save_state(directory, state)            # inside the `save` callback of `train`
train(..., resume=load_state(directory))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sdft_ray.errors import StoreError

_TENSORS = "state.safetensors"
_JSON = "state.json"
_FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """State after `step` finished steps, by parameter name.

    `weights` are the float32 masters of trainable parameters, `optimizer` the tensors that the optimizer keeps
    for each. `identity` holds what must be the same on resume: the plan's deciding fields and the size of the
    packed rows. Handed to `save`, the tensors are the live ones: write or clone them before returning.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    identity: dict[str, Any]


def capture(
    step: int,
    masters: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
) -> TrainState:
    """The state of a running training, without copies."""
    kept = {id(p): optimizer.state[p] for optimizer in optimizers for p in optimizer.state}
    return TrainState(
        step=step,
        weights={name: master.data for name, master in masters.items()},
        optimizer={name: dict(kept[id(master)]) for name, master in masters.items() if id(master) in kept},
        identity=identity,
    )


def restore_optimizers(
    state: TrainState, masters: Mapping[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Give the optimizers back what they kept for each parameter."""
    names = {id(master): name for name, master in masters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                kept = state.optimizer.get(names[id(param)], {})
                optimizer.state[param] = {key: value.to(param.device, copy=True) for key, value in kept.items()}


def save_state(directory: Path, state: TrainState) -> None:
    """Write `state` into `directory`, made if missing. The JSON file comes last and makes it complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights|{name}": value for name, value in state.weights.items()}
    for name, kept in state.optimizer.items():
        tensors |= {f"optimizer|{name}|{key}": value for key, value in kept.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / _TENSORS)
    content = {"format": _FORMAT, "step": state.step, "identity": state.identity}
    (directory / _JSON).write_text(json.dumps(content, indent=1), encoding="utf-8")


def load_state(directory: Path) -> TrainState:
    """Read what `save_state` wrote, onto the CPU. Raises `StoreError` if it is not complete."""
    directory = Path(directory)
    try:
        content = json.loads((directory / _JSON).read_text(encoding="utf-8"))
        tensors = load_file(directory / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"training state {directory} cannot be read: {error}", "delete it and train again") from error
    if content.get("format") != _FORMAT:
        raise StoreError(f"training state {directory} has another format", "delete it and train again")
    weights: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, name, *rest = key.split("|")
        if kind == "weights":
            weights[name] = value
        else:
            optimizer.setdefault(name, {})[rest[0]] = value
    return TrainState(int(content["step"]), weights, optimizer, content["identity"])
