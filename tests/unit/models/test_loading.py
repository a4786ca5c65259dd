"""Loading into stock transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from sdft_ray.errors import ModelError
from sdft_ray.models import families
from sdft_ray.models.families import FAMILIES
from sdft_ray.models.loading import check_config, check_finite, load_model
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_configs_of_every_family_are_built_without_weights(tmp_path, family, tied):
    config = json.loads((tiny.make_model(tmp_path, family, tied=tied) / "config.json").read_text(encoding="utf-8"))
    check_config({**config, "num_hidden_layers": 2, "layer_types": None}, "it", "change it")
    large = {"vocab_size": 200_000, "hidden_size": 16_384, "intermediate_size": 65_536}  # 13 GB, if it had weights
    check_config({**config, **large}, "it", "change it")


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("phi3", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 128}}, "short_factor field must"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1}, "not a multiple of the number of attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
        ("mistral", {"head_dim": "many"}, "head_dim"),
        ("llama", {"hidden_act": "unheard_of"}, "unheard_of"),
    ],
)
def test_configs_that_transformers_refuses(tmp_path, family, changes, told):
    directory = tiny.make_model(tmp_path, family)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(
        ModelError, match=rf"transformers refuses the config of the pruned model: .*{told}.* → change it"
    ):
        check_config({**config, **changes}, "the pruned model", "change it")


def test_a_table_that_is_not_what_transformers_builds(tmp_path, monkeypatch):
    config = json.loads((tiny.make_model(tmp_path, "llama") / "config.json").read_text(encoding="utf-8"))
    llama, qwen = FAMILIES["llama"], FAMILIES["qwen3"]
    monkeypatch.setattr(families, "FAMILIES", {"llama": replace(llama, tensors=qwen.tensors)})
    with pytest.raises(ModelError, match=r"it would have \S*q_norm\.weight of shape \[8\], .* builds it not at all"):
        check_config(config, "it", "change it")
    wide = [replace(tensor, axes=(*tensor.axes[:1], ("mlp",))) for tensor in llama.tensors[:1]]
    monkeypatch.setattr(families, "FAMILIES", {"llama": replace(llama, tensors=(*wide, *llama.tensors[1:]))})
    with pytest.raises(ModelError, match=r"embed_tokens.* \[128, 64\], but .* with the shape \[128, 32\]"):
        check_config(config, "it", "change it")


def test_what_was_written_is_built_before_it_is_read(tmp_path):
    directory = tiny.make_model(tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "new"}}))
    with pytest.raises(ModelError, match="transformers refuses the config of the model in"):
        check_finite(directory)
