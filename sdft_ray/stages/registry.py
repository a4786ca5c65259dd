"""Which function runs which stage, and what it holds while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from sdft_ray.errors import ResourceError
from sdft_ray.resources import Device, Resources
from sdft_ray.stages.job import Job, Made
from sdft_ray.stages.session import Capacity

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

    def of(device: Device, workers: int = 1) -> Demand:
        return Demand(device.cpus * workers, device.gpus * workers)

    match stage:
        case "measure" | "patch":
            return of(resources.measure)
        case "prune" | "merge":
            return of(resources.prune)
        case "generate":
            return of(resources.generate, resources.generate.min_actors)
        case "seed" | "select":
            return Demand(0.2)
        case "gap":
            return of(resources.gap)
        case "train" | "correct":
            return of(resources.train, resources.train.min_workers)
        case "evaluate" | "why":
            return of(resources.evaluate)
        case "speed" | "rate":
            return Demand(resources.speed.cpus, resources.speed.gpus, alone=True)
        case _:
            return Demand(0.0)


def check_capacity(stages: set[str], resources: Resources, capacity: Capacity) -> None:
    """Raises `ResourceError` when some stage could never start on this cluster."""
    for stage in sorted(stages):
        need = demand(stage, resources)
        for have, want, name in (
            (capacity.cpus, need.cpus, "CPUs"),
            (capacity.gpus, need.gpus, "GPUs"),
        ):
            if want > have + 1e-6:
                raise ResourceError(
                    f"{stage} needs {want:g} {name} at once and there are {have:g}",
                    f"lower {stage}'s workers or their {name.lower()} in the resources file, or add nodes",
                )
