"""Stage `plan`: choose the blocks to remove. The plan is a value: equal plans are one, however they were found."""

from __future__ import annotations

import json

from sdft_ray.models.source import ModelSource, read_config
from sdft_ray.pruning.plan import choose_blocks
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter
from sdft_ray.stages.measure import read_scores


def run(job: Job) -> Made:
    """Choose within the budget and store the plan. Light: it runs in the driver."""
    made = Made()
    with Meter() as meter, job.output(made) as directory:
        config = read_config(ModelSource(directory=str(job.model("teacher"))), None)
        assert config is not None
        scores = read_scores(job) if "measure" in job.inputs else None
        plan = choose_blocks(job.recipe.depth, config, scores)
        (directory / files.PLAN).write_text(plan.to_json(), encoding="utf-8")
        made.summary = {"plan": json.loads(plan.to_json())}
    made.usage = meter.usage()
    return made
