"""Response cross-entropy against the logits of transformers, summed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from sdft_ray.training.losses import response_loss
from tests.tiny import build_model


@pytest.fixture
def rows() -> PackedRows:
    lengths = [11, 7, 6, 5, 3]
    return pack([Document([(7 * n + i) % 128 for i in range(n)], [i >= n // 2 for i in range(n)]) for n in lengths], 16)


def naive_loss(model: Any, rows: PackedRows) -> torch.Tensor:
    """Each document alone, each marked token's -ln p from the full logits."""
    total = torch.zeros(())
    for document in rows.documents():
        log_probs_TV = model(input_ids=torch.tensor([document.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(document.ids)):
            if document.loss_mask[t]:
                total = total - log_probs_TV[t - 1, document.ids[t]]
    return total


def packed_loss(model: Any, rows: PackedRows, **kwargs: Any) -> torch.Tensor:
    inputs = attention_inputs(rows, range(rows.num_rows))
    return response_loss(model, inputs, torch.from_numpy(rows.loss_mask_NT), **kwargs)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma2", True)])
@pytest.mark.parametrize("max_logits", [2**25, 3 * 128])  # all at once; three tokens at a time
def test_loss_and_gradient_equal_the_naive_sum(family: str, tied: bool, max_logits: int, rows: PackedRows):
    softcap: dict[str, Any] = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model: Any = build_model(family, num_blocks=2, tied=tied, **softcap)
    expected, found = naive_loss(model, rows), packed_loss(model, rows, max_logits=max_logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_the_head_never_sees_more_tokens_than_a_chunk(rows: PackedRows):
    model: Any = build_model("llama", num_blocks=2)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    packed_loss(model, rows, max_logits=4 * 128).backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * rows.num_loss_tokens  # once forward, once more in the backward pass


def test_only_marked_tokens_count(rows: PackedRows):
    model: Any = build_model("llama", num_blocks=2)
    inputs = attention_inputs(rows, range(rows.num_rows))
    nothing = torch.zeros(rows.loss_mask_NT.shape, dtype=torch.bool)
    assert response_loss(model, inputs, nothing).item() == 0.0
    row, token = (int(x) for x in torch.from_numpy(rows.loss_mask_NT).nonzero()[0])
    one = nothing.clone()
    one[row, token] = True
    log_probs_NTV = model(**inputs).logits.log_softmax(-1)
    expected = -log_probs_NTV[row, token - 1, int(rows.input_ids_NT[row, token])]
    torch.testing.assert_close(response_loss(model, inputs, one), expected)
