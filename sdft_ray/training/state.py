"""What an interrupted training run needs to continue exactly: safetensors and JSON, no pickle.

save_state(directory, state)            # inside the `save` callback of `train`
train(..., resume=load_state(directory))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sdft_ray.errors import StoreError
from sdft_ray.store.fingerprint import file_digest

_TENSORS = "state.safetensors"
_JSON = "state.json"
_FORMAT = 2
_AGAIN = "delete it and train again"


@dataclass(frozen=True)
class TrainState:
    """State after `step` finished steps, by parameter name.

    `weights` are the float32 masters of trainable parameters, `optimizer` the tensors that the optimizer keeps
    for each, `averages` the running means of the weights where there are any. `identity` holds what must be the same
    on resume: the plan's deciding fields and the size of the packed rows. Handed to `save`, the tensors are the live
    ones: write or clone them before returning.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    identity: dict[str, Any]
    averages: dict[str, torch.Tensor] = field(default_factory=dict)


def capture(
    step: int,
    masters: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
    averages: Mapping[str, torch.Tensor],
) -> TrainState:
    """The state of a running training, without copies."""
    kept = {id(p): optimizer.state[p] for optimizer in optimizers for p in optimizer.state}
    return TrainState(
        step=step,
        weights={name: master.data for name, master in masters.items()},
        optimizer={name: dict(kept[id(master)]) for name, master in masters.items() if id(master) in kept},
        identity=identity,
        averages=dict(averages),
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
    """Write `state` into `directory`, made if missing. The JSON file comes last and makes it complete: it holds the
    digest of the tensors."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights|{name}": value for name, value in state.weights.items()}
    tensors |= {f"averages|{name}": value for name, value in state.averages.items()}
    for name, kept in state.optimizer.items():
        tensors |= {f"optimizer|{name}|{key}": value for key, value in kept.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / _TENSORS)
    digest = file_digest(directory / _TENSORS)
    content = {"format": _FORMAT, "step": state.step, "identity": state.identity, "sha256": digest}
    (directory / _JSON).write_text(json.dumps(content, indent=1), encoding="utf-8")


def check_state(directory: Path) -> dict[str, Any]:
    """What the JSON file says of a state whose every byte is there. Raises `StoreError`."""
    directory = Path(directory)
    try:
        content = json.loads((directory / _JSON).read_text(encoding="utf-8"))
        found = file_digest(directory / _TENSORS)
    except (OSError, ValueError) as error:
        raise StoreError(f"training state {directory} cannot be read: {error}", _AGAIN) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise StoreError(f"training state {directory} has another format", _AGAIN)
    if found != content.get("sha256"):
        raise StoreError(f"training state {directory} is damaged: its tensors are not those that were written", _AGAIN)
    return content


def load_state(directory: Path, *, checked: bool = False) -> TrainState:
    """Read what `save_state` wrote, onto the CPU. Raises `StoreError`; verifies the digest unless it was `checked`."""
    directory = Path(directory)
    try:
        content = json.loads((directory / _JSON).read_text(encoding="utf-8")) if checked else check_state(directory)
        tensors = load_file(directory / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"training state {directory} cannot be read: {error}", _AGAIN) from error
    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "averages": {}}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, name, *rest = key.split("|")
        if kind == "optimizer":
            optimizer.setdefault(name, {})[rest[0]] = value
        else:
            parts[kind][name] = value
    return TrainState(int(content["step"]), parts["weights"], optimizer, content["identity"], parts["averages"])
