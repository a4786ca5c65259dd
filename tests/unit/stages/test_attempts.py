"""What counts as running out of memory, and what is tried then, without Ray; with it: tests/ray/test_training.py."""

from __future__ import annotations

import errno

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from sdft_ray.recipe.resources import Train
from sdft_ray.stages.attempts import says_memory, smaller, was_killed


def real_errors() -> list[BaseException]:
    """As this machine raises them."""
    errors: list[BaseException] = []
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytes(2**62)):
        try:
            ask()
        except (RuntimeError, MemoryError) as error:
            errors.append(error)
    return errors


MONITOR = "Task was killed due to the node running low on memory. Memory on the node was 15.5GB / 16GB (0.97)"
KILLED = "Worker unexpectedly exits: (1) the process was killed by the OOM killer due to high memory usage. (2) ..."


@pytest.mark.parametrize(
    "error",
    [
        *real_errors(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        WorkerHealthCheckFailedError("rank 1", OutOfMemoryError(MONITOR)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_rank_that_ran_out_of_memory_is_found_among_those_that_lost_it(error: Exception) -> None:
    lost = RuntimeError("[gloo] Connection closed by peer")
    assert says_memory(WorkerGroupError("", {0: lost, 1: error}))
    assert not says_memory(WorkerGroupError("", {0: lost}))


def test_a_worker_that_was_killed_says_nothing_of_memory() -> None:
    died = ActorDiedError()
    died.error_msg = KILLED
    failure = WorkerGroupError("", {0: WorkerHealthCheckFailedError("rank 0", died)})
    assert KILLED in str(died)
    assert was_killed(failure)
    assert not says_memory(failure)
    assert not was_killed(WorkerGroupError("", {0: ValueError("a bug")}))


def test_less_memory_is_half_the_micro_batch_and_at_last_activation_checkpointing() -> None:
    settings: Train | None = Train(micro_batch_size=9, num_workers=1)
    tried = []
    while settings := smaller(settings, step_rows=64):
        tried.append((settings.micro_batch_size, settings.activation_checkpointing))
    assert tried == [(4, False), (2, False), (1, False), (1, True)]


def test_what_a_worker_never_has_at_once_is_not_halved() -> None:
    """Six rows a step over two workers: three each, whatever the micro-batch."""
    less = smaller(Train(micro_batch_size=64, num_workers=2), step_rows=6)
    assert less is not None
    assert less.micro_batch_size == 1
