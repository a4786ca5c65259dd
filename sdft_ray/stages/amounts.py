"""How much a pruning removes of the model that it starts from: as its recipe says, or as measured speed decided."""

from __future__ import annotations

import json

from sdft_ray.models.description import ModelDescription
from sdft_ray.models.families import Config
from sdft_ray.pruning.target import resolve_target
from sdft_ray.recipe.pruning import Depth, Width
from sdft_ray.recipe.yaml_model import as_frozen
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.views import pruning_view
from sdft_ray.store import files


def start_config(job: StageContext) -> Config:
    """Config of the model that this pruning starts from."""
    return ModelDescription.of(job.model("start")).config


def amounts(job: StageContext) -> tuple[Depth, Width | None]:
    """The recipe's `depth` and `width`, every open amount a number. Raises `PlanError` as `resolve_target`."""
    if "rate" not in job.inputs:
        return resolve_target(pruning_view(job.step), start_config(job), dtype=job.teacher.dtype)
    content = as_frozen(json.loads((job.input("rate") / files.AMOUNTS).read_text(encoding="utf-8")))
    return Depth.model_validate(content["depth"]), content["width"] and Width.model_validate(content["width"])
