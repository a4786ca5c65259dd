"""Loading into stock transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from sdft_ray.errors import ModelError
from sdft_ray.models.loading import check_finite, load_model
from tests.support import tiny


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", torch.float16, torch.float16),
    ],
)
def test_dtype(tmp_path, stored, asked, expected):
    model = load_model(tiny.make_model(tmp_path, dtype=stored), asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training


def test_weights_are_those_on_disk(tmp_path, capfd):
    directory = tiny.make_model(tmp_path, "phi3", tied=False)
    capfd.readouterr()
    shown = hf_logging.is_progress_bar_enabled()
    model = load_model(directory, "float32", attn="eager")
    assert hf_logging.is_progress_bar_enabled() == shown
    assert capfd.readouterr() == ("", "")
    assert model.config._attn_implementation == "eager"
    stored = load_file(directory / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_the_cap_on_attention_scores_counts(tmp_path):
    capped = tiny.make_model(tmp_path / "capped", "gemma2", dtype="float32", attn_logit_softcapping=0.5)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours, exact, without = (
            model(input_ids=ids).logits
            for model in (
                load_model(capped, "float32"),
                load_model(capped, "float32", attn="eager"),
                AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32, attn_implementation="sdpa"),
            )
        )
    assert torch.equal(ours, exact)
    assert (ours - without).abs().max() > 1e-3


def test_refused(tmp_path):
    directory = tiny.make_model(tmp_path)
    with pytest.raises(ModelError, match="int8"):
        load_model(directory, "int8")
    content = load_file(directory / "model.safetensors")
    content.pop("model.layers.0.mlp.up_proj.weight")
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(directory, "float32")


def test_finite(tmp_path):
    directory = tiny.make_model(tmp_path)
    check_finite(directory)
    content = load_file(directory / "model.safetensors")
    content["model.norm.weight"][3] = torch.nan
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        check_finite(directory)
