"""A head without its model gives the logits of transformers with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.head import load_head
from sdft_ray.models.loading import load_model
from tests.support.tiny import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    settings: dict[str, Any] = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    directory = make_model(tmp_path, family, num_blocks=2, tied=tied, dtype="bfloat16", **settings)
    model: Any = load_model(directory, "bfloat16")
    head, softcap = load_head(directory, "bfloat16")
    assert head.weight.dtype == torch.bfloat16
    assert not head.weight.requires_grad
    ids_1T = torch.arange(9)[None]
    with torch.no_grad():
        hidden_1TD = model.get_decoder()(input_ids=ids_1T).last_hidden_state
        logits_1TV = head(hidden_1TD)
        if softcap is not None:
            logits_1TV = torch.tanh(logits_1TV / softcap) * softcap
        assert torch.equal(logits_1TV, model(input_ids=ids_1T).logits)
    assert (softcap is not None) == (family == "gemma2")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = make_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        load_head(tmp_path, "float32")
