"""The crews of evaluation, as far as they can be seen without Ray."""

from __future__ import annotations

import pytest
import ray

from sdft_ray.recipe.resources import Evaluate
from sdft_ray.stages import evaluators
from sdft_ray.stages.evaluators import WorkerPool, acquire


def test_a_crew_that_went_with_ray_is_let_go_without_starting_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt ends Ray under a step; what the step does on its way out must not bring Ray back."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("another Ray is started"))
    monkeypatch.setattr(ray, "kill", lambda actor: pytest.fail("Ray, which would start another, is asked"))
    monkeypatch.setattr(evaluators, "_new_crew", lambda settings, harness: WorkerPool(object(), [object()]))
    with pytest.raises(SystemExit), acquire(Evaluate(), object):
        raise SystemExit(0)
