"""Documents in one packed row cannot see each other: each gives the logits that it gives alone."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from sdft_ray.training.attention import Layout, document_attention
from tests.support.tiny import FAMILIES, build_model

pytestmark = pytest.mark.slow

ROW_TOKENS = 64
WINDOW = 8

SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "phi3": {"sliding_window": WINDOW},
}
CASES = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    *(pytest.param(family, settings, id=f"{family}-window") for family, settings in SLIDING.items()),
]


def random_documents(seed: int = 0) -> list[Document]:
    """Lengths from one token to a whole row, most of them longer than the window."""
    rng = random.Random(seed)
    lengths = [ROW_TOKENS, 40, 30, 21, 20, 13, 9, 3, 1, 1]
    return [Document([rng.randrange(128) for _ in range(n)], [True] * n) for n in lengths]


def logits_by_document(model: Any, rows: PackedRows) -> list[tuple[list[int], torch.Tensor]]:
    with torch.no_grad():
        logits_NTV = model(**attention_inputs(rows, range(rows.num_rows))).logits
    found = []
    for row in range(rows.num_rows):
        segments_T = torch.from_numpy(rows.segment_ids_NT[row].copy())
        for segment in range(1, int(segments_T.max()) + 1):
            ids = rows.input_ids_NT[row][rows.segment_ids_NT[row] == segment].tolist()
            found.append((ids, logits_NTV[row][segments_T == segment]))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_packed_document_equals_the_document_alone(family: str, settings: dict[str, Any], attention: str):
    model: Any = build_model(family, **settings)
    model.set_attn_implementation("eager" if attention == "documents" else attention)
    rows = pack(random_documents(), ROW_TOKENS)
    assert rows.num_rows == 4
    with document_attention(model) if attention == "documents" else nullcontext():
        packed = logits_by_document(model, rows)
    assert len(packed) == len(random_documents())
    for ids, logits_TV in packed:
        with torch.no_grad():
            alone_TV = model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits_TV, alone_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_the_window_in_these_tests_bites(family: str):
    ids = torch.tensor([random_documents()[0].ids])
    with torch.no_grad():
        wide: Any = build_model(family)(input_ids=ids).logits
        narrow: Any = build_model(family, **SLIDING[family])(input_ids=ids).logits
    assert (wide - narrow).abs().max() > 0.1


def test_without_restarting_positions_documents_would_leak():
    model: Any = build_model("llama")
    rows = pack(random_documents(), ROW_TOKENS)
    inputs = attention_inputs(rows, range(rows.num_rows))
    with torch.no_grad():
        apart = model(**inputs).logits
        leaking = model(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}).logits
    assert (apart - leaking).abs().max() > 0.1


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_document_attention_has_the_gradients_of_masked_attention(family: str, settings: dict[str, Any]):
    model: Any = build_model(family, **settings)
    model.set_attn_implementation("eager")
    rows = pack(random_documents(), ROW_TOKENS)
    inputs = attention_inputs(rows, range(rows.num_rows))
    shown_NT = torch.from_numpy(rows.segment_ids_NT > 0)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits_NTV = model(**inputs).logits.log_softmax(-1)
        logits_NTV[shown_NT].square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    masked = gradients()
    with document_attention(model):
        apart = gradients()
    assert model.config._attn_implementation == "eager"
    assert apart.keys() == masked.keys()
    for name, gradient in masked.items():
        torch.testing.assert_close(apart[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=0)


@hypothesis.settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_layout_has_every_token_once_and_in_order(rows: list[list[int]]):
    row_tokens = max(map(sum, rows))
    positions_BT = torch.zeros(len(rows), row_tokens, dtype=torch.int64)
    for row, lengths in enumerate(rows):
        ends = [*lengths, row_tokens - sum(lengths)]
        positions_BT[row] = torch.cat([torch.arange(length) for length in ends])
    layout = Layout.of(positions_BT)
    slots = torch.cat([places_NL.reshape(-1) for places_NL in layout.groups])
    assert slots[layout.back].tolist() == list(range(positions_BT.numel()))
    flat = positions_BT.reshape(-1)
    for places_NL in layout.groups:
        steps = torch.diff(places_NL, dim=1)
        assert bool(((steps == 1) | (steps == 0)).all())
        assert bool((flat[places_NL[:, 0]] == 0).all())
        assert bool((flat[places_NL].diff(dim=1) == steps).all())  # never into the next document
