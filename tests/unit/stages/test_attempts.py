"""What counts as running out of memory, and what is tried then, without Ray; with it: tests/ray/test_training.py."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from sdft_ray.errors import ResourceError
from sdft_ray.recipe.resources import Train
from sdft_ray.stages import attempts
from sdft_ray.stages.attempts import says_memory, smaller, until_it_fits, was_killed
from sdft_ray.stages.job import StageContext
from tests.support.training_job import light, training_job


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
    error = ActorDiedError()
    error.error_msg = KILLED
    failure = WorkerGroupError("", {0: WorkerHealthCheckFailedError("rank 0", error)})
    assert KILLED in str(error)
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


def died() -> WorkerGroupError:
    return WorkerGroupError("", {0: WorkerHealthCheckFailedError("rank 0", ActorDiedError())})


def no_room() -> WorkerGroupError:
    return WorkerGroupError("", {1: MemoryError()})


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the kernel has killed for want of memory, on the one node that there is."""
    counts = {"node": 7}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(attempts, "_kernel_kills", counts.copy)
    return counts


@dataclass
class Fit:
    """Attempts that fail one after the other, and what each was asked for; then one that ends well."""

    failures: list[WorkerGroupError]
    asked: list[tuple[int, bool]] = field(default_factory=list)

    def __call__(self, job: StageContext) -> str:
        settings = job.resources.train
        self.asked.append((settings.micro_batch_rows, settings.activation_checkpointing))
        if self.failures:
            raise self.failures.pop(0)
        return "a student"


@pytest.fixture
def job(tmp_path: Path) -> StageContext:
    return training_job(tmp_path, light(micro_batch_size=2, max_failures=1))


def test_memory_is_saved_without_counting_as_one_of_the_failures(job: StageContext, kills: dict[str, int]) -> None:
    fit = Fit([no_room(), died(), no_room()])
    made, notes = until_it_fits(job, fit)
    assert made == "a student"
    assert fit.asked == [(2, False), (1, False), (1, False), (1, True)]
    assert notes == [
        "ran out of memory with micro-batches of 2 rows and went on with 1",
        "ran out of memory with micro-batches of 1 row and went on with activation checkpointing",
    ]


def test_where_nothing_fits_the_next_steps_are_named(job: StageContext, kills: dict[str, int]) -> None:
    with pytest.raises(ResourceError, match=r"train:sft: memory is too small for training, .*fsdp .*train.lora.*more"):
        until_it_fits(job, Fit([no_room() for _ in range(3)]))


def test_plain_deaths_are_tried_again_as_often_as_allowed(job: StageContext, kills: dict[str, int]) -> None:
    fit = Fit([died(), died()])
    with pytest.raises(WorkerGroupError):
        until_it_fits(job, fit)
    assert fit.asked == [(2, False)] * 2


def test_a_death_while_the_kernel_killed_for_memory_is_one_of_memory(job: StageContext, kills: dict[str, int]) -> None:
    class Killing(Fit):
        def __call__(self, job: StageContext) -> str:
            kills["node"] += bool(self.failures)
            return super().__call__(job)

    fit = Killing([died()])
    until_it_fits(job, fit)
    assert fit.asked == [(2, False), (1, False)]


def test_this_kernel_tells_how_often_it_killed() -> None:
    assert (attempts._own_kernel_kills() is not None) == Path("/proc/vmstat").exists()
