"""One training step: the gradient of a global batch, independent of its split over processes, and the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from sdft_ray.data.packing import PackedRows, attention_inputs
from sdft_ray.errors import DataError, DivergenceError
from sdft_ray.training.cached import CachedTeacher
from sdft_ray.training.losses import Teacher, response_loss
from sdft_ray.training.objective import Sums
from sdft_ray.training.optim import scale_learning_rates
from sdft_ray.training.parallel import Parallel
from sdft_ray.training.plan import StepRecord, TrainPlan
from sdft_ray.training.schedule import learning_rate
from sdft_ray.training.weights import Weights

_MAX_NAMED = 8


@dataclass(frozen=True)
class Run:
    """Everything that all steps of a training run share; see `loop.train`."""

    rows: PackedRows
    plan: TrainPlan
    parallel: Parallel
    weights: Weights
    optimizers: list[torch.optim.Optimizer]
    teacher: Teacher | None
    cached: CachedTeacher | None
    name_of: Callable[[int], str]

    @property
    def device(self) -> torch.device:
        return self.weights.gradients_P.device


def take_step(run: Run, step: int) -> StepRecord:
    """Do step `step` (0-based). Raises as `loop.train`."""
    started = time.perf_counter()
    rows, plan = run.rows, run.plan
    torch.manual_seed(_dropout_seed(plan.seed, step, run.parallel.rank))
    indices_G = rows_of_step(step, rows.num_rows, plan.rows_per_step, plan.seed)
    num_loss_tokens = int(np.count_nonzero(rows.loss_mask_NT[indices_G]))
    if num_loss_tokens == 0:
        names = _named(run, indices_G)
        raise DataError(f"no token of step {step + 1} counts in the loss: {names}", "check these responses")
    means, grad_norm, suspects = _gradient(run, indices_G, num_loss_tokens)
    mean = sum(plan.objective.weights[name] * value for name, value in means.items())
    if not math.isfinite(mean) or not math.isfinite(grad_norm):
        names = _named(run, indices_G[suspects()])
        raise DivergenceError(
            f"training diverged at step {step + 1}: loss {mean}, gradient norm {grad_norm}, {names}",
            "lower the learning rate, or look at these rows",
        )
    if grad_norm > plan.clip_norm:
        run.weights.gradients_P.mul_(plan.clip_norm / grad_norm)
    factor = learning_rate(step, plan.num_steps, 1.0, plan.schedule, plan.warmup_fraction, plan.decay_fraction)
    scale_learning_rates(run.optimizers, factor)
    for optimizer in run.optimizers:
        optimizer.step()
    run.weights.sync_to_model()
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


def _gradient(
    run: Run, indices_G: np.ndarray, num_loss_tokens: int
) -> tuple[dict[str, float], float, Callable[[], np.ndarray]]:
    """Fill the gradient buffer with the mean over the tokens of a step.

    Returns the mean of each term, the gradient's norm, and a function that finds the offending rows if they are not
    finite: the positions in the step of rows whose micro-batch had no finite loss, or all of them.
    """
    plan, weights = run.plan, run.weights
    weights.gradients_P.zero_()
    sums: Sums = {name: torch.zeros((), dtype=torch.float64, device=run.device) for name in plan.objective.terms}
    losses: list[torch.Tensor] = []
    micro_batches = _micro_batches(run, len(indices_G))
    for number, places in enumerate(micro_batches, 1):
        inputs, loss_mask_BT = batch(run.rows, indices_G[places], run.device)
        teacher_outputs = run.cached.outputs(indices_G[places], run.device) if run.cached else None
        settings = {"objective": plan.objective, "teacher": run.teacher, "cached": teacher_outputs, "sums": sums}
        compute = partial(response_loss, inputs=inputs, loss_mask_BT=loss_mask_BT, **settings)
        loss = weights.run(compute, is_last=number == len(micro_batches))
        (loss / num_loss_tokens).backward()
        losses.append(loss.detach())
    grad_norm = weights.reduce(run.parallel.sum_)
    sums_E = torch.stack([sums[name] for name in plan.objective.terms])
    run.parallel.sum_(sums_E)
    means = dict(zip(plan.objective.terms, (sums_E / num_loss_tokens).tolist(), strict=True))

    def suspects() -> np.ndarray:
        bad_G = torch.zeros(len(indices_G), device=run.device)
        for places, loss in zip(micro_batches, losses, strict=True):
            if not torch.isfinite(loss):
                bad_G[places] = 1
        run.parallel.sum_(bad_G)  # every process sees the same means, so all of them ask
        return bad_G.cpu().numpy() > 0 if bad_G.any() else np.ones(len(indices_G), bool)

    return means, grad_norm, suspects


def _micro_batches(run: Run, num_rows: int) -> list[np.ndarray]:
    """This process's places in a step, by micro-batches.

    With sharded weights each process takes part in every forward and backward pass of the others: then all get
    equally many micro-batches, the last perhaps empty.
    """
    mine = np.arange(run.parallel.rank, num_rows, run.parallel.world_size)
    in_lockstep = run.weights.part is not None
    most = -(-num_rows // run.parallel.world_size) if in_lockstep else len(mine)
    return [mine[start : start + run.plan.micro_batch_rows] for start in range(0, most, run.plan.micro_batch_rows)]


def _named(run: Run, indices: np.ndarray) -> str:
    """Packed rows and the documents in them, for a message."""
    documents = np.unique(run.rows.document_ids_NT[indices])
    documents = documents[documents >= 0]
    names = [run.name_of(int(document)) for document in documents[:_MAX_NAMED]]
    more = f" and {len(documents) - _MAX_NAMED} more" if len(documents) > _MAX_NAMED else ""
    numbers = ", ".join(map(str, sorted(indices)[:_MAX_NAMED]))
    return f"packed rows {numbers}, which hold {', '.join(names)}{more}"


def batch(rows: PackedRows, indices: np.ndarray, device: torch.device | str) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs of a micro-batch, and which of its tokens count. Without rows it is the first row, and no token counts."""
    chosen = indices if len(indices) else np.zeros(1, np.int64)
    loss_mask_BT = torch.from_numpy(rows.loss_mask_NT[chosen] & bool(len(indices)))
    return attention_inputs(rows, chosen, device=device), loss_mask_BT.to(device)


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
