"""Experiment trackers of a training: their folder in the store, and the configuration that they record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdft_ray.stages.job import StageContext
from sdft_ray.stages.views import trial_view

if TYPE_CHECKING:
    from sdft_ray.training.plan import TrainPlan
    from sdft_ray.training.tracking import Trackers


def trackers_of(job: StageContext, plan: TrainPlan) -> Trackers:
    """Those that the resources ask for, with a folder that outlives the step: `tracking/RECIPE/ARM-8 HEX`.

    It is named by the step's fingerprint, so that a training that begins again after a crash continues its run, and
    another one never does. Raises `ResourceError` where one is not installed.
    """
    from sdft_ray.training.tracking import build_trackers

    run_name = f"{job.step.label}-{job.address.rpartition('/')[2][:8]}"
    return build_trackers(
        job.resources.train.tracking,
        project=job.recipe_name,
        run_name=run_name,
        directory=job.store.url_of(f"tracking/{job.recipe_name}/{run_name}"),
        config={
            "teacher": job.teacher.name,
            "data": trial_view(job.step).data,
            "address": job.address,
            "num_workers": job.resources.train.workers,
            **plan.identity(),
        },
    )
