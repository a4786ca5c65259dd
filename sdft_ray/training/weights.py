"""Weights under training: those that the model computes with, and the masters that the optimizer updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sdft_ray.errors import StoreError
from sdft_ray.training.schedule import Precision
from sdft_ray.training.shards import Shard
from sdft_ray.training.state import TrainState
from sdft_ray.training.sums import l2_norm


class Weights:
    """Float32 `masters` of every trainable parameter, and one flat float32 buffer with all their gradients.

    With `fp32` the masters are the model's own parameters. With `bf16` the model computes with bfloat16
    copies, its buffers (rotary frequencies) stay as they are, and gradients of micro-batches are summed in
    float32: each as soon as the backward pass has it, so that never all of them exist in bfloat16 too. Call
    `sync_to_model` after each update, and `restore` at the end.

    `model` is what computes; `part` says which rows of each parameter the masters are, None where they are whole.
    """

    part: Shard | None = None

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.model: Any = model
        compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._params: dict[str, nn.Parameter] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._frozen: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.masters: dict[str, nn.Parameter] = {}
        for name, param in model.named_parameters():
            original = param.data
            param.grad = None
            if not param.requires_grad:
                if original.dtype != compute_dtype:
                    param.data = original.to(compute_dtype)
                    self._frozen.append((param, original))
                continue
            self._params[name] = param
            self._dtypes[name] = original.dtype
            param.data = original.to(compute_dtype)
            same = compute_dtype == torch.float32
            self.masters[name] = param if same else nn.Parameter(original.float())
        assert self.masters, "the model has no trainable parameter"
        self._shared = compute_dtype == torch.float32
        self.gradients_P = self._flat_gradients()
        self._hooks = [] if self._shared else [self._summed(name, param) for name, param in self._params.items()]

    def _flat_gradients(self) -> torch.Tensor:
        """One buffer of which every master's `.grad` is a view: one sum, one norm, one message."""
        masters = list(self.masters.values())
        flat_P = torch.zeros(sum(p.numel() for p in masters), dtype=torch.float32, device=masters[0].device)
        for master, part in zip(masters, flat_P.split([p.numel() for p in masters]), strict=True):
            master.grad = part.view(master.shape)
        return flat_P

    def run(self, compute: Callable[[Any], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """The loss that `compute` makes of the model, for a backward pass; `is_last` before the step's last one."""
        return compute(self.model)

    def _summed(self, name: str, param: nn.Parameter) -> RemovableHandle:
        """Have the gradients of a parameter moved into the float32 buffer, where autograd does not put them itself."""
        total = self.masters[name].grad
        assert total is not None

        def move(computed: torch.Tensor) -> None:
            assert computed.grad is not None
            total.add_(computed.grad)
            computed.grad = None

        return param.register_post_accumulate_grad_hook(move)

    def reduce(self, sum_: Callable[[torch.Tensor], None]) -> float:
        """Sum the gradients over all processes; returns their global L2 norm."""
        sum_(self.gradients_P)
        return l2_norm(self.gradients_P).item()

    def broadcast(self, broadcast_: Callable[[Iterable[torch.Tensor]], None]) -> None:
        """Start from the weights of rank 0 everywhere."""
        broadcast_(master.data for master in self.masters.values())
        self.sync_to_model()

    def shard_of(self, state: TrainState) -> TrainState:
        """The part of a state that belongs to these masters. Raises `StoreError` if the state does not contain it."""
        if state.part is not None:
            raise StoreError("the training state is a part of one and the weights are whole", "load all of it")
        return state

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Copy the masters' current values to the model."""
        if self._shared:
            return
        for name, param in self._params.items():
            param.copy_(self.masters[name])

    def restore(self) -> None:
        """Restore the original dtype of every parameter; trained ones get the masters' values."""
        for hook in self._hooks:
            hook.remove()
        for name, param in self._params.items():
            param.grad = None
            param.data = self.masters[name].data.to(self._dtypes[name])
        for param, original in self._frozen:
            param.data = original

    @torch.no_grad()
    def load(self, values: dict[str, Any]) -> None:
        """Set the masters, which must have exactly the names in `values`, and publish them."""
        assert values.keys() == self.masters.keys(), "the state belongs to other weights"
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.sync_to_model()
