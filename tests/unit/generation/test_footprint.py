"""Bytes of the teacher's pass by arithmetic."""

from __future__ import annotations

from sdft_ray.generation.footprint import bytes_per_token, pass_bytes
from sdft_ray.recipe.recipe import Generate
from tests.support.tiny import build_model

CONFIG = build_model("llama").config.to_dict()


def test_text_alone() -> None:
    found = pass_bytes(Generate(max_tokens=10), CONFIG, 6)
    assert (found.per_token.total, found.total) == (4, 6 * 10 * 4)


def test_all_products() -> None:
    asked = Generate(temperature=1.0, max_tokens=10, num_samples=3, top_logprobs=16, hidden_states=True)
    each = bytes_per_token(asked, CONFIG)
    # 128 tokens, 16 kept: 3 bits each as they are, 16 + 15 bits in unary, 16 codes and three floats.
    assert (each.text, each.top_logprobs, each.hidden_states) == (8, 6 + 4 + 16 + 12, 2 * 32)
    assert pass_bytes(asked, CONFIG, 6).total == 6 * 3 * 10 * each.total
    assert pass_bytes(asked, CONFIG, None).total is None
