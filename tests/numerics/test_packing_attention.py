"""Documents in one packed row cannot see each other: each gives the logits that it gives alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from tests.tiny import FAMILIES, build_model

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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_packed_document_equals_the_document_alone(family: str, settings: dict[str, Any], attention: str):
    model: Any = build_model(family, **settings)
    model.set_attn_implementation(attention)
    rows = pack(random_documents(), ROW_TOKENS)
    assert rows.num_rows == 4
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
