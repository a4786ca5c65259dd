"""Samplers as the resources configure them: in which data type, and what they say of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from sdft_ray.engines.settings import EngineSettings
from sdft_ray.engines.transformers import TransformersEngine
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.models import precision
from sdft_ray.recipe.resources import Evaluate
from sdft_ray.stages.samplers import local_sampler
from tests.support.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(make_model(tmp_path_factory.mktemp("half") / "model", "llama", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("state", "asked", "expected"),
    [("absent", "auto", "float32"), ("faster", "auto", "bfloat16"), ("slower", "bfloat16", "bfloat16")],
)
def test_the_type_of_the_weights_is_the_one_that_is_told(
    state: str, asked: str, expected: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bfloat16_state", lambda *, test=True: state)
    settings = Evaluate.model_validate({"dtype": asked})
    with closing(local_sampler(checkpoint, "transformers", settings, "bfloat16")) as sampler:
        assert isinstance(sampler, TransformersSampler)
        assert sampler._model.dtype is getattr(torch, expected)
        told = (sampler.engine["kind"], sampler.engine["dtype"], sampler.engine["checkpoint"])
        assert told == ("transformers", expected, "bfloat16")
    with closing(TransformersEngine.start(checkpoint, EngineSettings.model_validate({"dtype": asked}))) as engine:
        assert engine._model.dtype is getattr(torch, expected)
        assert engine.precision is not None
        assert engine.precision.dtype == expected
