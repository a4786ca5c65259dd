"""What every stage is, in one table: version, module, workers, disk space, and how its output counts downstream.

A new stage takes an entry here, its steps in `stages.graph`, and a file of its own with
`run(job) -> StageResult`. Everything that treats stages alike (graph, scheduler, preflight, explain) reads this table.
It needs neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sdft_ray.models.size import ModelSize
from sdft_ray.recipe.arms import Train
from sdft_ray.recipe.resources import Device, Resources

HARNESS_CPUS = 0.1
"""CPUs of the lm-eval harness beside the engines: it works while they start, and mostly waits later."""
_TEXT_CPUS = 0.2
"""CPUs of a task that reads and checks text."""


@dataclass(frozen=True)
class DiskEstimate:
    """What the bytes that a step writes are estimated from."""

    model: ModelSize
    """Size of the model that the step makes or trains; of a corrected teacher, the teacher's."""
    train: Train
    """The training that the step belongs to."""
    generated_bytes: int
    """Upper bound of what one pass of generation keeps."""


def _checkpoint(estimate: DiskEstimate) -> int:
    return estimate.model.weight_bytes


def _training(estimate: DiskEstimate) -> int:
    """Two checkpoints of weights, with float32 master weights and two optimizer states or with adapters."""
    size = estimate.model
    state = 3 * 4 * size.num_parameters if estimate.train.lora is None else size.weight_bytes // 10
    return 2 * size.weight_bytes + state


def _generated(estimate: DiskEstimate) -> int:
    return estimate.generated_bytes


def _little(estimate: DiskEstimate) -> int:
    del estimate
    return 0


@dataclass(frozen=True)
class StageSpec:
    """One stage. Only `version` and how the output counts are part of identity."""

    version: int
    """Raise it when the stage's output changes for the same recipe."""
    module: str = ""
    """Module of `stages` whose `run` makes a step; "" for the report, which the pipeline makes."""
    workers: str = ""
    """Part of `Resources` that describes its workers; "" for a stage that runs in the driver or in one light task."""
    num_workers: str = ""
    """Field of that part with the number of workers that must run at once; "" is one."""
    extra_cpus: float = 0.0
    """CPUs that the stage holds beside its workers."""
    runs_alone: bool = False
    """Nothing that holds a CPU runs beside it, because it measures speed."""
    one_at_a_time: bool = False
    """Two steps of the stage never run at once: their rows may share a cache, and its pool grows by itself."""
    keeps_engines: bool = False
    """Its engines stay up for the next step of the stage while there is room; they are stopped for others."""
    frees_engines: bool = False
    """Engines that wait for another model to evaluate are ended before it starts: it needs the memory they hold."""
    writes: Callable[[DiskEstimate], int] = _little
    """Bytes that a step writes, 0 where they do not matter."""
    output: Literal["artifact", "value", "choice"] = "artifact"
    """How the output counts downstream: as the step's fingerprint; as the content of the manifest's summary entry that
    is named after the stage, so that equal values are one; or as the input that the summary names as `chosen`."""
    reads_summaries: bool = False
    """It reads what its inputs report of themselves: choices as they are, and trials that diverged, which have no
    model."""


STAGES: dict[str, StageSpec] = {
    "seed": StageSpec(3, "rows", extra_cpus=_TEXT_CPUS),
    "calibration": StageSpec(3, "rows"),
    "rate": StageSpec(1, "rate", workers="speed", runs_alone=True),
    "measure": StageSpec(3, "measure", workers="measure"),
    "plan": StageSpec(1, "plan", output="value"),
    "prune": StageSpec(2, "prune", workers="prune", writes=_checkpoint),
    "patch": StageSpec(2, "patch", workers="measure", writes=_checkpoint),
    "generate": StageSpec(
        4, "generate", workers="generate", num_workers="min_actors", one_at_a_time=True, writes=_generated
    ),
    "select": StageSpec(4, "select", extra_cpus=_TEXT_CPUS),
    "gap": StageSpec(4, "gap", workers="gap"),
    "correct": StageSpec(
        3, "correct", workers="train", num_workers="min_workers", frees_engines=True, writes=_training
    ),
    "train": StageSpec(3, "train", workers="train", num_workers="min_workers", frees_engines=True, writes=_training),
    "choose": StageSpec(1, "choose", output="choice", reads_summaries=True),
    "merge": StageSpec(2, "merge", workers="prune", writes=_checkpoint),
    "evaluate": StageSpec(
        4, "evaluate", workers="evaluate", num_workers="num_actors", extra_cpus=HARNESS_CPUS, keeps_engines=True
    ),
    "texts": StageSpec(2, "rows"),
    "forget": StageSpec(3, "forget", workers="gap"),
    "likeness": StageSpec(1, "likeness", workers="gap"),
    "speed": StageSpec(2, "speed", workers="speed", runs_alone=True),
    "why": StageSpec(3, "why", workers="evaluate"),
    "report": StageSpec(4, reads_summaries=True),
}

VERSIONS = {name: spec.version for name, spec in STAGES.items()}


@dataclass(frozen=True)
class Demand:
    """CPUs, GPUs and main memory that a step needs at once before it can make progress; 0 bytes where nobody planned.
    `alone`: see `StageSpec.runs_alone`."""

    cpus: float
    gpus: float = 0.0
    alone: bool = False
    memory_bytes: int = 0


def workers_of(stage: str, resources: Resources) -> Device | None:
    """The part of the resources that describes the stage's workers; None for a stage that has none."""
    name = STAGES[stage].workers
    return getattr(resources, name) if name else None


def demand(stage: str, resources: Resources, memory_bytes: int = 0) -> Demand:
    """The smallest share of a cluster with which the stage cannot stall. `memory_bytes`: as planned for the step."""
    spec, device = STAGES[stage], workers_of(stage, resources)
    if device is None:
        return Demand(spec.extra_cpus, memory_bytes=memory_bytes)
    count = getattr(device, spec.num_workers) if spec.num_workers else 1
    return Demand(device.cpus * count + spec.extra_cpus, device.gpus * count, spec.runs_alone, memory_bytes)
