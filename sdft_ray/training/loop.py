"""The training loop: packed rows in, a trained model out, one process or many.

    plan = TrainPlan(num_steps=120, rows_per_step=16, learning_rate=3e-4, precision="bf16")
    summary = train(model, rows, plan, report=lambda record: history.append(record))

Under Ray Train each worker calls the same function with `parallel=Ddp()`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sdft_ray.data.packing import PackedRows, attention_inputs
from sdft_ray.errors import DataError, DivergenceError, StoreError
from sdft_ray.training.losses import Teacher, response_loss
from sdft_ray.training.objective import Sums
from sdft_ray.training.optim import build_optimizer, scale_learning_rates
from sdft_ray.training.parallel import Parallel, Single
from sdft_ray.training.plan import StepRecord, TrainPlan, TrainSummary
from sdft_ray.training.schedule import Precision, learning_rate
from sdft_ray.training.state import TrainState, capture, restore_optimizers
from sdft_ray.training.weights import Weights

__all__ = ["StepRecord", "TrainPlan", "TrainSummary", "mean_loss", "rows_of_step", "train"]

_EAGER_ROW_TOKENS = 512


def train(
    model: Any,
    rows: PackedRows,
    plan: TrainPlan,
    *,
    teacher: Teacher | None = None,
    parallel: Parallel | None = None,
    report: Callable[[StepRecord], None] | None = None,
    save: Callable[[TrainState], None] | None = None,
    resume: TrainState | None = None,
) -> TrainSummary:
    """Train `model` in place on the trainable parameters it has, on the device it is on.

    Every process passes the same arguments and its own model; rank 0's trainable weights are used. `teacher` is for
    objectives that compare with one. `report`
    is called after every step and `save` after every `plan.checkpoint_every` steps, on every process, with the
    same values. With `resume` training continues after `resume.step` steps, bit for bit as without the
    interruption at the same number of processes on the same machine. The model comes back in eval mode and
    in the dtype it came in.

    The loss of a step is the sum over the response tokens of all its rows divided by their number, so it and
    its gradient do not depend on micro-batches or processes (up to rounding).

    Raises `DataError` without response tokens, `StoreError` if `resume` belongs to another run, `DivergenceError`
    when the loss or the gradient is not finite.
    """
    parallel = parallel or Single()
    if rows.num_loss_tokens == 0:
        raise DataError("no token of the packed rows counts in the loss", "check the responses")
    identity = {**plan.identity(), "num_rows": rows.num_rows, "num_loss_tokens": rows.num_loss_tokens}
    if resume is not None and resume.identity != identity:
        raise StoreError("the training state belongs to another plan or data set", "start without it")
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_private_random_numbers(device))
        stack.enter_context(_training(model, rows.row_tokens, plan.precision))
        if teacher is not None:
            stack.enter_context(_quick_attention(teacher.model, rows.row_tokens))
        weights = Weights(model, plan.precision)
        optimizers = build_optimizer(
            model,
            plan.optimizer,
            plan.learning_rate,
            plan.weight_decay,
            betas=plan.betas,
            adamw_learning_rate=plan.adamw_learning_rate,
            parameters=weights.masters,
        )
        first_step = 0
        if resume is not None:
            weights.load(resume.weights)
            restore_optimizers(resume, weights.masters, optimizers)
            first_step = resume.step
        else:
            parallel.broadcast_(master.data for master in weights.masters.values())
            weights.publish()
        done: list[StepRecord] = []
        for step in range(first_step, plan.num_steps):
            done.append(_step(model, rows, plan, step, parallel, weights, optimizers, teacher))
            if report is not None:
                report(done[-1])
            if save is not None and plan.checkpoint_every and (step + 1) % plan.checkpoint_every == 0:
                save(capture(step + 1, weights.masters, optimizers, identity))
        weights.restore()
    return _summary(done)


def _step(
    model: Any,
    rows: PackedRows,
    plan: TrainPlan,
    step: int,
    parallel: Parallel,
    weights: Weights,
    optimizers: list[torch.optim.Optimizer],
    teacher: Teacher | None,
) -> StepRecord:
    started = time.perf_counter()
    device = weights.gradients_P.device
    torch.manual_seed(_dropout_seed(plan.seed, step, parallel.rank))
    indices_G = rows_of_step(step, rows.num_rows, plan.rows_per_step, plan.seed)
    num_loss_tokens = int(np.count_nonzero(rows.loss_mask_NT[indices_G]))
    weights.gradients_P.zero_()
    terms = plan.objective.terms
    sums: Sums = {name: torch.zeros((), device=device) for name in terms}
    mine = indices_G[parallel.rank :: parallel.world_size]
    for start in range(0, len(mine), plan.micro_batch_rows):
        chosen = mine[start : start + plan.micro_batch_rows]
        inputs, loss_mask_BT = _batch(rows, chosen, device)
        loss = response_loss(model, inputs, loss_mask_BT, objective=plan.objective, teacher=teacher, sums=sums)
        (loss / max(1, num_loss_tokens)).backward()
        weights.collect()
    parallel.sum_(weights.gradients_P)
    sums_E = torch.stack([sums[name] for name in terms])
    parallel.sum_(sums_E)
    means = dict(zip(terms, (sums_E / max(1, num_loss_tokens)).tolist(), strict=True))
    mean = sum(getattr(plan.objective, name) * value for name, value in means.items())
    grad_norm = torch.linalg.vector_norm(weights.gradients_P).item()
    if not math.isfinite(mean) or not math.isfinite(grad_norm):
        raise DivergenceError(
            f"training diverged at step {step + 1}: loss {mean}, gradient norm {grad_norm}",
            "lower the learning rate",
        )
    if grad_norm > plan.clip_norm:
        weights.gradients_P.mul_(plan.clip_norm / grad_norm)
    factor = learning_rate(step, plan.num_steps, 1.0, plan.schedule, plan.warmup_fraction, plan.decay_fraction)
    scale_learning_rates(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
    weights.publish()
    return StepRecord(
        step=step + 1,
        loss=mean,
        grad_norm=grad_norm,
        learning_rate=plan.learning_rate * factor,
        num_tokens=int(np.count_nonzero(rows.segment_ids_NT[indices_G])),
        num_loss_tokens=num_loss_tokens,
        wall_s=time.perf_counter() - started,
        terms=means,
    )


def _batch(rows: PackedRows, indices: np.ndarray, device: torch.device | str) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of a micro-batch, and which of its tokens count."""
    return attention_inputs(rows, indices, device=device), torch.from_numpy(rows.loss_mask_NT[indices]).to(device)


def rows_of_step(step: int, num_rows: int, rows_per_step: int, seed: int) -> np.ndarray:
    """Row indices (G,) of global step `step` (0-based); rank r of w takes `[r::w]`.

    Rows come in one random order per epoch, and a step may cross into the next. The order depends on `seed`
    alone: not on the number of processes, not on where training was resumed.
    """
    positions_G = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    return np.array([_epoch_order(num_rows, seed, int(p // num_rows))[p % num_rows] for p in positions_G])


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@torch.no_grad()
def mean_loss(model: Any, rows: PackedRows, *, micro_batch_rows: int = 8, precision: Precision = "fp32") -> float:
    """Mean over all response tokens of -ln p, in nats per token. Raises `DataError` if there are none."""
    if rows.num_loss_tokens == 0:
        raise DataError("no token of the packed rows counts in the loss", "check the responses")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for start in range(0, rows.num_rows, micro_batch_rows):
            indices = np.arange(start, min(start + micro_batch_rows, rows.num_rows))
            total += response_loss(model, *_batch(rows, indices, device)).item()
    model.train(was_training)
    return total / rows.num_loss_tokens


@contextmanager
def _training(model: Any, row_tokens: int, precision: Precision) -> Iterator[None]:
    """Train mode inside, eval mode after."""
    with _quick_attention(model, row_tokens, bf16=precision == "bf16"):
        model.train()
        try:
            yield
        finally:
            model.eval()


@contextmanager
def _quick_attention(model: Any, row_tokens: int, *, bf16: bool | None = None) -> Iterator[None]:
    """Attention by plain matrix products where those are the fastest.

    On CPUs the fused kernel takes twice the time of plain products on short bfloat16 rows, and saves memory only on
    long ones. `bf16` says whether the model computes in it; None looks at its weights.
    """
    configured = model.config._attn_implementation
    weight = next(model.parameters())
    bf16 = weight.dtype == torch.bfloat16 if bf16 is None else bf16
    short = weight.device.type == "cpu" and bf16 and row_tokens <= _EAGER_ROW_TOKENS
    if short and configured == "sdpa":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != configured:
            model.set_attn_implementation(configured)


@contextmanager
def _private_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers as they were: dropout is seeded anew in every step."""
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
