"""The state from which an interrupted training run continues exactly: safetensors and JSON, no pickle.

save_state(directory, state)            # inside the `save` callback of `train`
train(..., resume=load_state(directory))

Where every process holds a part of each weight, each writes its own pair of files into the same directory, and any
number of processes can read them again (`sdft_ray.training.shards`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sdft_ray.errors import StoreError
from sdft_ray.store.fingerprint import file_digest
from sdft_ray.training.shards import Index, Shard, file_stem, placements, read_indices, read_part, whole_shapes

_FORMAT = 2
_AGAIN = "delete it and train again"


@dataclass(frozen=True)
class TrainState:
    """State after `step` finished steps, by parameter name.

    `weights` are the float32 masters of trainable parameters, `optimizer` the tensors that the optimizer keeps
    for each, `averages` the running means of the weights where there are any. `identity` holds what must be the same
    on resume: the plan's deciding fields and the size of the packed rows. With `part` the tensors are one process's
    rows of the whole. Handed to `save`, the tensors are the live ones: write or clone them before returning.
    """

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    identity: dict[str, Any]
    averages: dict[str, torch.Tensor] = field(default_factory=dict)
    part: Shard | None = None


def capture(
    step: int,
    masters: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    identity: dict[str, Any],
    averages: Mapping[str, torch.Tensor],
    part: Shard | None = None,
) -> TrainState:
    """The state of a running training, without copies."""
    states = {id(p): optimizer.state[p] for optimizer in optimizers for p in optimizer.state}
    return TrainState(
        step=step,
        weights={name: master.data for name, master in masters.items()},
        optimizer={name: dict(states[id(master)]) for name, master in masters.items() if id(master) in states},
        identity=identity,
        averages=dict(averages),
        part=part,
    )


def restore_optimizers(
    state: TrainState, masters: Mapping[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Restore the optimizers' state of each parameter."""
    names = {id(master): name for name, master in masters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                values = state.optimizer.get(names[id(param)], {})
                optimizer.state[param] = {key: value.to(param.device, copy=True) for key, value in values.items()}


def save_state(directory: Path, state: TrainState) -> None:
    """Write `state` into `directory`, made if missing. The JSON file comes last and makes it complete: it holds the
    digest of the tensors.

    A part of a state goes into files of its own name; it is complete with those of all other processes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _named(state)
    path = directory / f"{file_stem(state.part)}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    content: dict[str, Any] = {"format": _FORMAT, "step": state.step, "identity": state.identity}
    content["sha256"] = file_digest(path)
    if state.part is not None:
        content["slices"] = placements({key: value.shape for key, value in tensors.items()}, state.part)
    path.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def check_state(directory: Path) -> int:
    """The step of a state. Raises `StoreError` unless the digests of all its files match."""
    indices = _indices(directory)
    for path, index in indices.items():
        if file_digest(path) != index.get("sha256"):
            message = f"training state {directory} is damaged: {path.name} does not match its digest"
            raise StoreError(message, _AGAIN)
    return int(next(iter(indices.values()))["step"])


def load_state(directory: Path, *, rank: int = 0, world_size: int = 1, checked: bool = False) -> TrainState:
    """Read a state onto the CPU, whatever the number of processes that wrote it.

    With `world_size` above 1 only the rows are read that process `rank` holds of each weight. Raises `StoreError`
    if the state is not complete, or, unless it was `checked` before, if it is damaged.
    """
    if not checked:
        check_state(directory)
    indices = _indices(directory)
    try:
        tensors = read_part(indices, rank, world_size)
        shapes = whole_shapes(indices) if world_size > 1 else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"training state {directory} cannot be read: {error}", _AGAIN) from error
    content = next(iter(indices.values()))
    kinds: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "averages": {}}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, name, *rest = key.split("|")
        if kind == "optimizer":
            optimizer.setdefault(name, {})[rest[0]] = value
        else:
            kinds[kind][name] = value
    part = Shard(rank, world_size, shapes) if world_size > 1 else None
    step, identity = int(content["step"]), content["identity"]
    return TrainState(step, kinds["weights"], optimizer, identity, kinds["averages"], part)


def _indices(directory: Path) -> dict[Path, Index]:
    """The JSON beside each file of tensors. Raises `StoreError`."""
    try:
        indices = read_indices(Path(directory))
        missing = [path.name for path in indices if not path.exists()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"training state {directory} cannot be read: {error}", _AGAIN) from error
    if missing:
        raise StoreError(f"training state {directory} cannot be read: {missing[0]} is missing", _AGAIN)
    if any(index.get("format") != _FORMAT for index in indices.values()):
        raise StoreError(f"training state {directory} has an unknown format", _AGAIN)
    return indices


def shard_of(state: TrainState, part: Shard) -> TrainState:
    """The rows of a whole state that a process of `part` holds. A state that is that part already is returned as it is.

    Raises `StoreError` for the part of another process, or of a model of other shapes.
    """
    if state.part is None:
        shapes = {key.split("|")[1]: tuple(value.shape) for key, value in _named(state).items() if key[0] == "w"}
        target = Shard(part.rank, part.world_size, shapes)
        rows = {name: target.rows(name) for name in shapes}
        weights = {name: value[rows[name]] for name, value in state.weights.items()}
        averages = {name: value[rows[name]] for name, value in state.averages.items()}
        optimizer = {
            name: {key: v[rows[name]] if tuple(v.shape) == shapes[name] else v for key, v in values.items()}
            for name, values in state.optimizer.items()
        }
        state = replace(state, weights=weights, averages=averages, optimizer=optimizer, part=target)
    if state.part != part:
        raise StoreError("the training state is the part of another process or model", "load it for this rank")
    return state


def _named(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor by the key that it has on disk: `weights|<parameter>`, `optimizer|<parameter>|<name>`."""
    tensors = {f"weights|{name}": value for name, value in state.weights.items()}
    tensors |= {f"averages|{name}": value for name, value in state.averages.items()}
    for name, values in state.optimizer.items():
        tensors |= {f"optimizer|{name}|{key}": value for key, value in values.items()}
    return tensors
