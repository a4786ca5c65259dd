"""Stage `correct`: the unpruned teacher, briefly tuned on the distillation data (arXiv:2408.11796, section 3).

It is a training like any other, of another model: stage `train` takes the teacher where it is given no pruned one.
"""

from __future__ import annotations

from sdft_ray.stages.train import run

__all__ = ["run"]
