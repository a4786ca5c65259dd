"""The training loop: packed rows in, a trained model out, one process or many.

    plan = TrainPlan(num_steps=120, rows_per_step=16, learning_rate=3e-4, precision="bf16")
    summary = train(model, rows, plan, report=lambda record: history.append(record))

Under Ray Train each worker calls the same function with `parallel=ReplicatedParallel()`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from sdft_ray.data.packing import PackedRows
from sdft_ray.errors import DataError, StoreError
from sdft_ray.training.attention import document_attention
from sdft_ray.training.average import Average
from sdft_ray.training.cached import CachedTeacher
from sdft_ray.training.losses import Teacher, response_loss
from sdft_ray.training.meter import StepMeter
from sdft_ray.training.optim import build_optimizer
from sdft_ray.training.parallel import Parallel, Single
from sdft_ray.training.plan import StepRecord, TrainPlan, TrainSummary
from sdft_ray.training.schedule import Precision
from sdft_ray.training.state import TrainState, capture, restore_optimizers
from sdft_ray.training.step import Run, batch, rows_of_step, take_step
from sdft_ray.training.weights import Weights

__all__ = ["StepRecord", "TrainPlan", "TrainSummary", "mean_loss", "rows_of_step", "train"]


def train(
    model: Any,
    rows: PackedRows,
    plan: TrainPlan,
    *,
    teacher: Teacher | None = None,
    cached: CachedTeacher | None = None,
    parallel: Parallel | None = None,
    report: Callable[[StepRecord], None] | None = None,
    save: Callable[[TrainState], None] | None = None,
    resume: TrainState | None = None,
    name_of: Callable[[int], str] = str,
) -> TrainSummary:
    """Train `model` in place on the trainable parameters it has, on the device it is on.

    Every process passes the same arguments and its own model; rank 0's trainable weights are used. `teacher` is for
    objectives that run a teacher beside the student, `cached` for those that read its outputs from the generated data.
    `report` is called after every step and `save` after those at which a checkpoint is due by `plan`, on every process,
    with the same values. With `resume`, which is let go of once it is loaded, training continues after `resume.step`
    steps: bit for bit as without the interruption at the same number of processes on the same machine, and up to
    rounding at another number (without dropout, whose masks depend on the rank). Afterwards the model is in eval mode
    and has its original dtype.

    The loss of a step is the sum over the response tokens of all its rows divided by their number, so it and
    its gradient do not depend on micro-batches or processes (up to rounding).

    Raises `DataError` if no row, or no row of a step, has response tokens, `StoreError` if `resume` belongs to another
    run, `DivergenceError` if the loss or the gradient is not finite. `name_of` maps the index of a packed document to
    the name used in these messages.
    """
    parallel = parallel or Single()
    if rows.num_loss_tokens == 0:
        raise DataError("no token of the packed rows counts in the loss", "check the responses")
    identity = {**plan.identity(), "num_rows": rows.num_rows, "num_loss_tokens": rows.num_loss_tokens}
    if resume is not None:
        _check_identity(resume.identity, identity)
    weights = parallel.weights(model, plan.precision)
    with ExitStack() as stack:
        stack.enter_context(_private_random_numbers(weights.gradients_P.device))
        stack.enter_context(_training(weights.model, plan))
        if teacher is not None:
            stack.enter_context(_quick_attention(teacher.model))
        session = _Session(plan, parallel, weights, identity)
        first_step = session.start(resume)
        del resume  # as large as weights and optimizer together
        run = Run(rows, plan, parallel, weights, session.optimizers, teacher, cached, name_of)
        meter = StepMeter(weights.model, rows, plan, teacher, parallel.world_size)
        checkpoints = _Checkpoints(plan, parallel, run.device)
        records: list[StepRecord] = []
        for step in range(first_step, plan.num_steps):
            record = take_step(run, step)
            session.average.update(step)
            records.append(meter.completed(record, rows_of_step(step, rows.num_rows, plan.rows_per_step, plan.seed)))
            if report is not None:
                report(records[-1])
            if save is not None and checkpoints.is_due(step + 1):
                save(session.state(step + 1))
                checkpoints.restart()
        session.average.sync_to_model()
        weights.restore()
    return _summary(records)


class _Session:
    """Everything that a checkpoint holds: the weights, their optimizers, and their running average."""

    def __init__(self, plan: TrainPlan, parallel: Parallel, weights: Weights, identity: dict[str, Any]) -> None:
        self._parallel = parallel
        self._weights = weights
        self._identity = identity
        self.optimizers = build_optimizer(
            weights.model,
            plan.optimizer,
            plan.learning_rate,
            plan.weight_decay,
            betas=plan.betas,
            adamw_learning_rate=plan.adamw_learning_rate,
            parameters=weights.masters,
            in_parts=weights.part is not None,
        )
        self.average = Average(weights.masters, plan.ema_decay)

    def start(self, state: TrainState | None) -> int:
        """Continue from `state`, or start from the weights of rank 0; returns the number of steps already done.

        Raises `StoreError` unless all processes start at the same step.
        """
        first_step = state.step if state is not None else 0
        _check_same_start(first_step, self._parallel, self._weights.gradients_P.device)
        if state is None:
            self._weights.broadcast(self._parallel.broadcast_)
            self.average.start()
            return first_step
        state = self._weights.shard_of(state)
        self._weights.load(state.weights)
        restore_optimizers(state, self._weights.masters, self.optimizers)
        self.average.load(state.averages)
        return first_step

    def state(self, step: int) -> TrainState:
        """The state after `step` steps, without copies."""
        weights = self._weights
        return capture(step, weights.masters, self.optimizers, self._identity, self.average.values, weights.part)


class _Checkpoints:
    """When a checkpoint is due: by steps, and by the clock of rank 0. Every process asks after every step."""

    def __init__(self, plan: TrainPlan, parallel: Parallel, device: torch.device) -> None:
        self._plan = plan
        self._parallel = parallel
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Count the seconds from now."""
        self._since_s = time.monotonic()

    def is_due(self, num_steps: int) -> bool:
        """After `num_steps` steps; the same on every process."""
        every, every_s = self._plan.checkpoint_every, self._plan.checkpoint_every_s
        if every and num_steps % every == 0:
            return True
        if not every_s:
            return False
        is_late = torch.tensor([float(time.monotonic() - self._since_s >= every_s)], device=self._device)
        self._parallel.broadcast_([is_late])  # clocks of processes differ
        return bool(is_late.item())


def _check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise `StoreError` with the fields that differ."""
    changed = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    if changed:
        changes = ", ".join(f"{key} {saved.get(key)} → {current.get(key)}" for key in changed)
        raise StoreError(
            f"the training state belongs to another plan or data set: {changes}", "remove it to train from the start"
        )


def _check_same_start(first_step: int, parallel: Parallel, device: torch.device) -> None:
    """Raise `StoreError` unless all processes start at the same step."""
    steps = torch.zeros(parallel.world_size, device=device)
    steps[parallel.rank] = first_step
    parallel.sum_(steps)
    if len(set(steps.tolist())) > 1:
        raise StoreError(
            f"workers would resume from different steps: {steps.tolist()}", "resume all from one checkpoint"
        )


@torch.no_grad()
def mean_loss(
    model: Any,
    rows: PackedRows,
    *,
    parallel: Parallel | None = None,
    micro_batch_rows: int = 8,
    precision: Precision = "fp32",
) -> float:
    """Mean over all response tokens of -ln p, in nats per token. Raises `DataError` if there are none.

    All processes of `parallel` call it with the same rows, score their shares, and get the same mean.
    """
    parallel = parallel or Single()
    if rows.num_loss_tokens == 0:
        raise DataError("no token of the packed rows counts in the loss", "check the responses")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    mine = np.arange(parallel.rank, rows.num_rows, parallel.world_size)
    with _quick_attention(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        # Sharded models need equally many passes on all ranks, so the last one may be empty.
        for start in range(0, -(-rows.num_rows // parallel.world_size), micro_batch_rows):
            total += response_loss(model, *batch(rows, mine[start : start + micro_batch_rows], device))
    model.train(was_training)
    parallel.sum_(total)
    return total.item() / rows.num_loss_tokens


@contextmanager
def _training(model: Any, plan: TrainPlan) -> Iterator[None]:
    """Train mode inside, eval mode after."""
    with _quick_attention(model):
        model.train()
        if plan.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if plan.activation_checkpointing:
                model.gradient_checkpointing_disable()
            model.eval()


def _quick_attention(model: Any) -> AbstractContextManager[None]:
    """On CPUs attention is computed within documents only; elsewhere as the model is configured."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return document_attention(model) if on_cpu else nullcontext()


@contextmanager
def _private_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the caller's random state afterwards: every step sets its own seed for dropout."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _summary(records: list[StepRecord]) -> TrainSummary:
    tail = deque(records, maxlen=max(1, len(records) // 10))
    tail_tokens = sum(record.num_loss_tokens for record in tail)
    tail_loss = sum(record.loss * record.num_loss_tokens for record in tail)
    return TrainSummary(
        num_steps=len(records),
        num_tokens=sum(record.num_tokens for record in records),
        num_loss_tokens=sum(record.num_loss_tokens for record in records),
        loss=tail_loss / tail_tokens if tail_tokens else math.nan,
        wall_s=sum(record.wall_s for record in records),
    )
