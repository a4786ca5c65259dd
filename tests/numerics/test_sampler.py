"""The decoding loop of the transformers sampler against transformers' own `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.generation.sampler import SamplingParams, row_seed
from sdft_ray.generation.transformers_sampler import TransformersSampler
from tests.support.tiny import EOS_ID, PAD_ID, build_model, make_model

PROMPTS = [
    [1, 30, 31, 32],
    [1, 40],
    [1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60],
    [1, 60, 61],
    [1, 33, 44, 55, 66],
]
SEEDS = [row_seed(0, f"row{i}", 0) for i in range(len(PROMPTS))]
GREEDY = SamplingParams(max_tokens=24)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_greedy_decoding_equals_generate(tmp_path: Path, family: str) -> None:
    sampler = TransformersSampler(make_model(tmp_path, family), dtype="float32", max_sequences=4)
    rows = sampler.sample(PROMPTS, GREEDY, SEEDS)
    model: Any = build_model(family)
    for ids, row in zip(PROMPTS, rows, strict=True):
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=EOS_ID, pad_token_id=PAD_ID
        )
        assert list(row.token_ids) == whole[0, len(ids) :].tolist()
