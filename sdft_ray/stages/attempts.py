"""Attempts at one training run: each goes on from the last checkpoint, with less memory where the one before ran out.

Ray Train would try again with the same settings, whatever the reason, so it is told not to.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdft_ray.errors import ResourceError
from sdft_ray.progress.killed import OUT_OF_MEMORY, RAY_SAYS_LOW
from sdft_ray.recipe.resources import Train
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.views import train_view

T = TypeVar("T")

_WRAPPED = ("cause", "_base_exc", "health_check_failure", "controller_failure", "__cause__")
"""Where errors of Ray keep the error that they stand for."""


def until_it_fits(job: StageContext, fit: Callable[[StageContext], T]) -> tuple[T, list[str]]:
    """What `fit` makes of a training job, and notes on what had to be changed for it.

    After an attempt that ran out of memory the next has half the micro-batch, and at one row activation checkpointing:
    the result differs by rounding alone. Any other failure of workers is tried again as it is, `max_failures` times.
    Raises `ResourceError` where nothing is left that would take less memory.
    """
    notes: list[str] = []
    num_left = job.resources.train.max_failures
    while True:
        kills = _kernel_kills()
        try:
            return fit(job), notes
        except (TrainingFailedError, RayError) as failure:
            if not ray.is_initialized():
                raise
            if not says_memory(failure) and not (was_killed(failure) and _kernel_killed(since=kills)):
                if not num_left or not isinstance(failure, WorkerGroupError):
                    raise
                num_left -= 1
                continue
            settings = job.resources.train
            less = smaller(settings, train_view(job.step).step_rows)
            if less is None:
                raise _too_small(job) from failure
            had, has = _words(settings, less, train_view(job.step).step_rows)
            job.notice(f"{job.step.name} ran out of memory with {had}: it goes on from its last checkpoint with {has}")
            notes.append(f"ran out of memory with {had} and went on with {has}")
            job = replace(job, resources=job.resources.model_copy(update={"train": less}))


def smaller(settings: Train, step_rows: int) -> Train | None:
    """The settings that take less memory for the same result, None where there are none.

    `step_rows` are the rows of an optimizer step, of which a worker never has more than its share at once.
    """
    rows = _micro_batch_rows(settings, step_rows)
    if rows > 1:
        return settings.model_copy(update={"micro_batch_size": rows // 2})
    if not settings.activation_checkpointing:
        return settings.model_copy(update={"micro_batch_size": 1, "activation_checkpointing": True})
    return None


def _micro_batch_rows(settings: Train, step_rows: int) -> int:
    return min(settings.micro_batch_rows, math.ceil(step_rows / settings.min_workers))


def _words(had: Train, has: Train, step_rows: int) -> tuple[str, str]:
    if has.activation_checkpointing != had.activation_checkpointing:
        return "micro-batches of 1 row", "activation checkpointing"
    return f"micro-batches of {_micro_batch_rows(had, step_rows)} rows", str(has.micro_batch_size)


def _too_small(job: StageContext) -> ResourceError:
    settings, recipe = job.resources.train, train_view(job.step)
    ways = []
    if settings.strategy == "ddp" and settings.num_workers != 1:
        ways.append("set train.strategy: fsdp or fewer train.num_workers in the resources file")
    if recipe.lora is None and recipe.train_last_n_layers is None:
        ways.append("set train.lora in the recipe")
    ways += ["lower train.max_seq_len in the recipe", "take a machine with more memory"]
    return ResourceError(
        f"{job.step.name}: memory is too small for training, even with micro-batches of 1 row and activation"
        " checkpointing; finished steps and checkpoints are kept",
        ", or ".join(ways),
    )


def says_memory(failure: BaseException) -> bool:
    """Whether the failure of a worker says that memory ran out: in the worker, or by Ray's memory monitor."""
    return any(_says_memory(error) for error in _errors_of(failure))


def _says_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's and Ray's
        return True
    if isinstance(error, RayError):  # of a worker that died of anything it names memory among the possible causes
        return RAY_SAYS_LOW in str(error)
    if not isinstance(error, RuntimeError | OSError):
        return False
    return getattr(error, "errno", None) == errno.ENOMEM or any(words in str(error) for words in OUT_OF_MEMORY)


def was_killed(failure: BaseException) -> bool:
    """Whether a worker died without a word."""
    return any(isinstance(error, RayActorError) for error in _errors_of(failure))


def _errors_of(failure: BaseException) -> Iterator[BaseException]:
    """The failure and every error inside, of all ranks."""
    yield failure
    inside: list[Any] = [getattr(failure, name, None) for name in _WRAPPED]
    inside += getattr(failure, "worker_failures", {}).values()
    for error in inside:
        if isinstance(error, BaseException):
            yield from _errors_of(error)


def _kernel_kills() -> dict[str, int]:
    """Processes that the kernel has killed for want of memory since it started, by node; only of nodes that tell."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        counts = [_own_kernel_kills()]
    else:
        count: Any = ray.remote(_own_kernel_kills)
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [count.options(num_cpus=0, scheduling_strategy=place).remote() for place in places]
        counts = [_answer(ref) for ref in asked]
    return {node: count for node, count in zip(nodes, counts, strict=True) if count is not None}


def _kernel_killed(*, since: dict[str, int]) -> bool:
    """Whether the kernel has killed a process for want of memory after `_kernel_kills()` was `since`."""
    return any(count > since.get(node, count) for node, count in _kernel_kills().items())


def _answer(ref: Any) -> int | None:
    try:
        return ray.get(ref, timeout=30)
    except (RayError, GetTimeoutError):  # the node has gone, or is too busy
        return None


def _own_kernel_kills() -> int | None:
    """Of this machine, containers included; None where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
