"""Fully sharded data parallelism (FSDP2, `torch.distributed.fsdp.fully_shard`): no process holds the whole model.

Each process keeps some rows of every parameter, of its gradient and of the optimizer's tensors, all in float32, and
whole parameters exist only while their block computes: with n processes 16/n bytes per parameter instead of 16. Two
things are still whole everywhere: the model in main memory before it is cut, and a teacher beside the student.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from sdft_ray.training.parallel import ReplicatedParallel
from sdft_ray.training.schedule import Precision
from sdft_ray.training.shards import Shard
from sdft_ray.training.state import TrainState, shard_of
from sdft_ray.training.sums import dot
from sdft_ray.training.weights import Weights


class ShardedParallel(ReplicatedParallel):
    """The default process group of torch.distributed, which holds one model together.

    `device` (`cpu`, or `cuda` for the current GPU) is where shards lie and blocks compute; a model may come in main
    memory and is moved there block by block. `reshard_after_forward` frees a block's weights between its forward and
    its backward pass, and gathers them twice. `reduce_once` sums gradients once a step: less communication, but with
    several micro-batches a step every process holds the whole gradient in float32 meanwhile.
    """

    def __init__(
        self, device: Literal["cpu", "cuda"] = "cpu", *, reshard_after_forward: bool = True, reduce_once: bool = True
    ) -> None:
        super().__init__()
        self.share = (self.rank, self.world_size)
        # FSDP computes on the current GPU, which also torch's mesh would choose if nobody had.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.mesh = init_device_mesh(device, (self.world_size,))
        self.reshard_after_forward = reshard_after_forward
        self.reduce_once = reduce_once

    def weights(self, model: nn.Module, precision: Precision) -> Weights:
        """This process's rows of every parameter."""
        return ShardedWeights(model, precision, self)


class _Root(nn.Module):
    """Inside its forward pass the parameters outside of blocks are whole: embeddings, last norm and head.

    The loss is computed in there, because it applies the head's weight itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        return compute(self.model)


class ShardedWeights(Weights):
    """`Weights` of which this process holds some rows: masters, gradients and all that optimizers keep.

    Masters and gradients are plain tensors that share memory with FSDP's own (DTensors), so whatever works element by
    element works on them. Gradients are summed, not averaged.

    `self.model` has the structure of the given model and takes its parameters over: those of the given one are empty
    until `restore`, after which they are whole again on rank 0, and stay empty elsewhere.
    """

    def __init__(self, model: nn.Module, precision: Precision, group: ShardedParallel) -> None:
        originals = dict(model.named_parameters())
        self._given = originals
        self._dtypes = {name: p.dtype for name, p in originals.items()}
        self._origin = next(iter(originals.values())).device
        self._group = group
        self._shared = True
        # A structure of its own: what fully_shard does to modules cannot be undone.
        self.model = copy.deepcopy(model, {id(p): p for p in originals.values()})
        self._root: Any = _shard(self.model, precision, group)
        self._sharded: dict[str, Any] = dict(self.model.named_parameters())
        trained = {name: p for name, p in self._sharded.items() if p.requires_grad}
        assert trained, "the model has no trainable parameter"
        self.masters = {name: nn.Parameter(p.to_local().detach()) for name, p in trained.items()}
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self.part = Shard(group.rank, group.world_size, shapes)
        self.gradients_P = self._flat_gradients()
        for name, p in trained.items():
            assert self.masters[name].shape[0] == len(range(*self.part.rows(name).indices(p.shape[0])))
            p.grad = _sharded_like(p, self.masters[name].grad, group.mesh)

    def run(self, compute: Callable[[Any], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """As `Weights.run`. All processes call it equally often, with losses that need the same modules."""
        self._root.set_requires_gradient_sync(is_last or not self._group.reduce_once)
        self._root.set_is_last_backward(is_last)
        return self._root(compute)

    def reduce(self, sum_: Callable[[torch.Tensor], None]) -> float:
        """The global L2 norm of the gradients, which the last backward pass has summed."""
        squares = dot(self.gradients_P, self.gradients_P)
        sum_(squares)
        return squares.sqrt().item()

    def broadcast(self, broadcast_: Callable[[Iterable[torch.Tensor]], None]) -> None:
        """Nothing is left to do: the shards were cut from the weights of rank 0."""

    def shard_of(self, state: TrainState) -> TrainState:
        """This process's rows of a state, which may be whole. Raises `StoreError` if they are not in it."""
        assert self.part is not None
        return shard_of(state, self.part)

    @torch.no_grad()
    def restore(self) -> None:
        """Gather parameters one by one; rank 0 puts them into the given model, on its device and in its dtypes."""
        for name, param in self._sharded.items():
            whole = param.full_tensor()
            if self._group.rank == 0:
                self._given[name].data = whole.to(self._origin, self._dtypes[name])


def _shard(model: Any, precision: Precision, group: ShardedParallel) -> nn.Module:
    """Cut the parameters of every decoder block, and then all others, and return the module to run."""
    compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    root = _Root(model)
    for block in model.get_decoder().layers:
        _shard_module(block, policy, group, reshard_after_forward=group.reshard_after_forward)
    _shard_module(root, policy, group, reshard_after_forward=False)
    return root


def _shard_module(
    module: Any, policy: MixedPrecisionPolicy, group: ShardedParallel, *, reshard_after_forward: bool
) -> None:
    """Cut the parameters of `module` that are whole yet; trainable ones in float32, as rank 0 has them."""
    params = [p for p in module.parameters() if not isinstance(p, DTensor)]
    for p in params:
        p.grad = None
        if p.requires_grad:
            p.data = p.data.to(group.device, torch.float32).contiguous()
            group.broadcast_([p.data])
    fully_shard(module, mesh=group.mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    # The loop divides by the tokens of the whole step; and gloo knows no average.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    for p in params:
        p.data = p.data.new_empty(0)


def _sharded_like(param: DTensor, local: torch.Tensor | None, mesh: DeviceMesh) -> DTensor:
    """`local` as this process's rows of a tensor of the shape of `param`."""
    assert local is not None
    return DTensor.from_local(
        local, mesh, [ShardPlacement(0)], run_check=False, shape=param.shape, stride=param.stride()
    )
