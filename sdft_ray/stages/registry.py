"""Which function runs which stage, and what it holds while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from sdft_ray.errors import ResourceError
from sdft_ray.recipe.resources import Evaluate, Generate, Resources, Train
from sdft_ray.stages.job import Job, Made
from sdft_ray.stages.session import Capacity

HARNESS_CPUS = 0.1
"""What the harness beside the engines of an evaluation holds: it works while they start, and mostly waits later."""

_MODULES = {
    "seed": "rows",
    "calibration": "rows",
    "rate": "rate",
    "measure": "measure",
    "plan": "plan",
    "prune": "prune",
    "patch": "patch",
    "generate": "generate",
    "select": "select",
    "gap": "gap",
    "correct": "correct",
    "train": "train",
    "choose": "choose",
    "merge": "merge",
    "evaluate": "evaluate",
    "texts": "rows",
    "forget": "forget",
    "likeness": "likeness",
    "speed": "speed",
    "why": "why",
}


def runner(stage: str) -> Callable[[Job], Made]:
    """The stage's `run`; its module is imported on first use."""
    return import_module(f"sdft_ray.stages.{_MODULES[stage]}").run


@dataclass(frozen=True)
class Demand:
    """What a step needs at once before it can make progress. `alone` keeps others off while speed is measured."""

    cpus: float
    gpus: float = 0.0
    alone: bool = False


def demand(stage: str, resources: Resources) -> Demand:
    """The smallest share of a cluster with which the stage cannot stall."""

    match stage, resources.part(stage):
        case "seed" | "select", _:
            return Demand(0.2)
        case "speed" | "rate", (_, device):
            return Demand(device.cpus, device.gpus, alone=True)
        case "evaluate", (_, Evaluate() as device):
            return Demand(device.cpus * device.num_actors + HARNESS_CPUS, device.gpus * device.num_actors)
        case "generate", (_, Generate() as device):
            workers = device.min_actors
        case "train" | "correct", (_, Train() as device):
            workers = device.min_workers
        case _, (_, device):
            workers = 1
        case _:
            return Demand(0.0)
    return Demand(device.cpus * workers, device.gpus * workers)


def check_capacity(stages: set[str], resources: Resources, capacity: Capacity) -> None:
    """Raises `ResourceError` when some stage could never start on this cluster."""
    for stage in sorted(stages):
        need = demand(stage, resources)
        for have, want, name in (
            (capacity.cpus, need.cpus, "CPUs"),
            (capacity.gpus, need.gpus, "GPUs"),
        ):
            if want > have + 1e-6:
                part, _ = resources.part(stage) or (stage, None)
                raise ResourceError(
                    f"{stage} needs {want:g} {name} at once and there are {have:g}",
                    f"lower the workers of {part} or their {name} in the resources file, or add nodes",
                )
