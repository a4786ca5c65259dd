"""Data parallelism: every process holds the whole model and processes its share of each step's rows.

The gradients are summed once per step, in one flat float32 buffer, after the last backward pass. Unlike
`torch.nn.parallel.DistributedDataParallel` this does not overlap communication with the backward pass. In return the
sum does not depend on how the rows are split into micro-batches, whatever the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from sdft_ray.training.schedule import Precision
from sdft_ray.training.weights import Weights

_SLICE_ELEMENTS = 2**24  # 64 MiB of float32 in one message


class Parallel(Protocol):
    """The operations that the training loop needs from a group of processes."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def share(self) -> tuple[int, int]:
        """(index, number) of the share of each weight that this process holds; (0, 1) is all of it."""
        ...

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes."""
        ...

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        ...

    def weights(self, model: nn.Module, precision: Precision) -> Weights:
        """The weights of `model` that this process trains."""
        ...


class Single:
    """One process: nothing to exchange."""

    rank = 0
    world_size = 1
    share = (0, 1)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Leave `tensor` as it is."""

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave `tensors` as they are."""

    def weights(self, model: nn.Module, precision: Precision) -> Weights:
        """All weights."""
        return Weights(model, precision)


class ReplicatedParallel:
    """Synchronous data parallelism over the default process group (gloo on CPUs, nccl on GPUs), which must exist.

    Not torch's DistributedDataParallel, in spite of the name: there are no gradient buckets and no overlap of
    communication with the backward pass, but one all-reduce of all gradients per step, in slices of 64 MiB. Ray Train
    initialises the process group for its workers; elsewhere call `torch.distributed.init_process_group` first.
    """

    share = (0, 1)

    def __init__(self) -> None:
        assert dist.is_initialized(), "torch.distributed has no process group"
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over all processes."""
        pending = [dist.all_reduce(part, async_op=True) for part in tensor.view(-1).split(_SLICE_ELEMENTS)]
        for work in pending:
            assert work is not None
            work.wait()

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def weights(self, model: nn.Module, precision: Precision) -> Weights:
        """All weights."""
        return Weights(model, precision)


@contextmanager
def local_group(rank: int, world_size: int, folder: Path) -> Iterator[ReplicatedParallel]:
    """A gloo group of `world_size` processes on one machine, which connect through a file in `folder`."""
    place = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    try:
        yield ReplicatedParallel()
    finally:
        dist.destroy_process_group()
