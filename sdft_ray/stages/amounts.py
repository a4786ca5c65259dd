"""How much a pruning removes of the model that it starts from: as its recipe says, or as measured speed decided."""

from __future__ import annotations

import json

from sdft_ray.models.families import Config
from sdft_ray.models.source import ModelSource, read_config
from sdft_ray.pruning.target import resolve_target
from sdft_ray.recipe.pruning import Depth, Width
from sdft_ray.recipe.yaml_model import as_frozen
from sdft_ray.stages.job import Job
from sdft_ray.store import files


def start_config(job: Job) -> Config:
    """Config of the model that this pruning starts from."""
    config = read_config(ModelSource(directory=str(job.model("start"))), None)
    assert config is not None, "a model has a config"
    return config


def amounts(job: Job) -> tuple[Depth, Width | None]:
    """The recipe's `depth` and `width`, every open amount a number. Raises `PlanError` as `resolve_target`."""
    if "rate" not in job.inputs:
        return resolve_target(job.recipe, start_config(job), dtype=job.recipe.teacher.dtype)
    content = as_frozen(json.loads((job.input("rate") / files.AMOUNTS).read_text(encoding="utf-8")))
    return Depth.model_validate(content["depth"]), content["width"] and Width.model_validate(content["width"])
