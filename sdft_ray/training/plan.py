"""Values that go into training and come out of it. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from sdft_ray.recipe import resources
from sdft_ray.recipe.arms import Objective, Train
from sdft_ray.recipe.yaml_model import canonical
from sdft_ray.training.schedule import OptimizerKind, Precision, ScheduleKind

_EXECUTION_FIELDS = ("micro_batch_rows", "checkpoint_every", "checkpoint_every_s", "activation_checkpointing")


@dataclass(frozen=True)
class TrainPlan:
    """How to train. A step sees `rows_per_step` rows over all processes, in micro-batches of `micro_batch_rows`.

    `precision`: `fp32`, or `bf16` for bfloat16 weights and activations with float32 master weights.
    `adamw_learning_rate` is used with `optimizer="muon"` for everything but block matrices (None: the same
    rate). A checkpoint is due after `checkpoint_every` steps, or after `checkpoint_every_s` seconds since the last one;
    0 leaves that reason out. `ema_decay` in (0, 1) makes the running mean of the weights the result
    (`average.Average`). `activation_checkpointing` keeps of each block its input alone and computes the rest again in
    the backward pass: less memory, about a third more work, the same gradients. See also `schedule.learning_rate`
    and `optim.build_optimizer`.
    """

    num_steps: int
    rows_per_step: int
    learning_rate: float
    micro_batch_rows: int = 8
    optimizer: OptimizerKind = "adamw"
    schedule: ScheduleKind = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    adamw_learning_rate: float | None = None
    clip_norm: float = 1.0
    precision: Precision = "fp32"
    seed: int = 0
    checkpoint_every: int = 0
    checkpoint_every_s: float = 0.0
    objective: Objective = field(default_factory=Objective)
    ema_decay: float | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        assert self.num_steps >= 1, "num_steps is at least 1"
        assert self.rows_per_step >= 1, "rows_per_step is at least 1"
        assert self.micro_batch_rows >= 1, "micro_batch_rows is at least 1"

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result; how it is executed is left out. Plain JSON values."""
        fields = {name: value for name, value in asdict(self).items() if name not in _EXECUTION_FIELDS}
        objective = canonical(self.objective)
        return {**fields, "betas": list(self.betas), "objective": objective}


def arm_plan(train: Train, name: str, settings: resources.Train, num_rows: int) -> TrainPlan:
    """The plan of one trial of a recipe. An epoch is every one of the `num_rows` packed rows once."""
    trial = train.trials[name]
    num_steps = train.num_steps or math.ceil(num_rows * (train.num_epochs or 1.0) / train.step_rows)
    return TrainPlan(
        num_steps=num_steps,
        rows_per_step=train.step_rows,
        learning_rate=trial.learning_rate,
        micro_batch_rows=settings.micro_batch_rows,
        optimizer=train.optimizer,
        schedule=train.schedule,
        warmup_fraction=train.warmup_fraction,
        weight_decay=train.weight_decay,
        clip_norm=train.max_grad_norm,
        precision=settings.precision,
        seed=trial.seed,
        checkpoint_every=settings.checkpoint_every,
        checkpoint_every_s=settings.checkpoint_every_s,
        objective=trial.objective,
        ema_decay=train.ema_decay,
        activation_checkpointing=settings.activation_checkpointing,
    )


@dataclass(frozen=True)
class StepRecord:
    """One finished step, the same on every process but for what it cost.

    `step` counts finished steps: 1 after the first. `loss` is the objective per response token, in nats where it
    has no hidden states; `terms` are its parts before their weights. `grad_norm` is the global L2 norm before
    clipping, `wall_s` the seconds that the step took here. Tokens are those of documents, over all processes.

    What it cost, as `meter.StepMeter` saw it from this process, None where nobody measured: `mfu` is a fraction of the
    devices' peak, `peak_memory_bytes` the most that this process took so far (`device.PeakMemory`).
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_loss_tokens: int
    wall_s: float
    terms: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class TrainSummary:
    """What one call of `train` did: steps before a resume are not counted.

    `loss` is the mean over the response tokens of the last tenth of the steps, in nats; NaN without steps.
    """

    num_steps: int
    num_tokens: int
    num_loss_tokens: int
    loss: float
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of documents per second over all processes; padding is not counted."""
        return self.num_tokens / self.wall_s if self.wall_s else 0.0
