"""Stage `correct`: the unpruned teacher, briefly tuned on the distillation data (arXiv:2408.11796, section 3).

It is a training like any other, of another model: stage `train` takes the teacher where it is given no pruned one.
"""

from __future__ import annotations

from dataclasses import replace

from sdft_ray.stages import train
from sdft_ray.stages.job import Job, Made


def run(job: Job) -> Made:
    """Train the teacher as `Recipe.correction` says; the corrected one is a whole checkpoint."""
    correction = job.recipe.correction
    assert correction is not None, "the recipe corrects the teacher"
    return train.run(replace(job, recipe=job.recipe.model_copy(update={"train": correction})))
