"""Which function runs which stage, and whether a cluster can hold it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from sdft_ray.errors import ResourceError
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.job import StageContext, StageResult
from sdft_ray.stages.session import Capacity
from sdft_ray.stages.spec import STAGES, demand


def runner(stage: str) -> Callable[[StageContext], StageResult]:
    """The stage's `run`; its module is imported on first use."""
    return import_module(f"sdft_ray.stages.{STAGES[stage].module}").run


def check_capacity(stages: set[str], resources: Resources, capacity: Capacity) -> None:
    """Raises `ResourceError` when some stage could never start on this cluster."""
    for stage in sorted(stages):
        need = demand(stage, resources)
        for have, want, name in (
            (capacity.cpus, need.cpus, "CPUs"),
            (capacity.gpus, need.gpus, "GPUs"),
        ):
            if want > have + 1e-6:
                part = STAGES[stage].workers or stage
                raise ResourceError(
                    f"{stage} needs {want:g} {name} at once, but the cluster has {have:g}",
                    f"lower the number of workers of {part}, or their {name}, in the resources file, or add nodes",
                )
