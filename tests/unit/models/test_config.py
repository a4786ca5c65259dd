"""What a config says about each block before and after pruning, against transformers' own reading of it."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from sdft_ray.errors import ModelError, PlanError
from sdft_ray.models.config import check_keep_blocks, config_with_blocks, layer_types
from tests.support import tiny

BASE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}

PATTERNS = [
    {"model_type": "gemma2", "num_hidden_layers": 7},
    {"model_type": "gemma3_text", "num_hidden_layers": 13},
    {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window_pattern": 3},
    {"model_type": "qwen2", "num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 4},
    {"model_type": "qwen2", "num_hidden_layers": 6, "use_sliding_window": False, "max_window_layers": 4},
    {"model_type": "qwen2", "num_hidden_layers": 30, "use_sliding_window": True},
    {
        "model_type": "qwen3",
        "num_hidden_layers": 6,
        "use_sliding_window": True,
        "sliding_window": None,
        "max_window_layers": 2,
    },
    {"model_type": "qwen3", "num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 2},
]


def of_transformers(config):
    fields = {name: value for name, value in config.items() if name != "model_type"}
    return AutoConfig.for_model(config["model_type"], **BASE, **fields)


@pytest.mark.parametrize("config", PATTERNS, ids=lambda c: f"{c['model_type']}-{len(c)}-{c['num_hidden_layers']}")
def test_layer_types_are_those_of_transformers(config):
    expected = of_transformers(config).layer_types
    assert layer_types(config) == expected
    assert layer_types({**config, "layer_types": expected[::-1]}) == expected[::-1]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_families_of_one_kind_have_none(model_type):
    assert layer_types({"model_type": model_type, "num_hidden_layers": 4}) is None


@pytest.mark.parametrize("config", PATTERNS, ids=lambda c: f"{c['model_type']}-{len(c)}-{c['num_hidden_layers']}")
@pytest.mark.parametrize("cut", [range(2), range(2, 4), range(1, 4), range(3, 6), (1, 3, 5)], ids=str)
def test_every_kept_block_keeps_its_kind(config, cut):
    keep = [block for block in range(config["num_hidden_layers"]) if block not in cut]
    pruned = config_with_blocks(config, keep)
    before, after = of_transformers(config), of_transformers(pruned)
    assert after.num_hidden_layers == len(keep)
    assert after.layer_types == [before.layer_types[block] for block in keep]
    assert after.sliding_window == before.sliding_window
    without_list = {name: value for name, value in pruned.items() if name != "layer_types"}
    if config["model_type"].startswith("qwen"):  # the older field says the same, for readers that know only it
        assert of_transformers(without_list).layer_types == after.layer_types


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_all_is_the_identity(family):
    config = tiny.build_model(family).config.to_dict()
    assert config_with_blocks(config, range(4)) == config


def test_unrelated_fields_survive():
    config = {**tiny.build_model("llama").config.to_dict(), "house_note": [1, 2, 3, 4]}
    pruned = config_with_blocks(config, [0, 3])
    assert pruned.pop("num_hidden_layers") == 2
    assert pruned == {name: value for name, value in config.items() if name != "num_hidden_layers"}


def test_an_explicit_list_is_cut_in_any_family():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = {"model_type": "llama", "num_hidden_layers": 3, "layer_types": kinds}
    assert config_with_blocks(config, [1, 2])["layer_types"] == kinds[1:]


@pytest.mark.parametrize("kinds", [["full_attention"] * 3, "full_attention"])
def test_list_of_the_wrong_length(kinds):
    with pytest.raises(ModelError, match="layer_types"):
        layer_types({"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": kinds})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keeps no block"),
        ([0, 0], "increasing"),
        ([1, 0], "increasing"),
        ([0, 4], "no block 4"),
        ([-1, 0], "-1"),
    ],
)
def test_refused_choices(keep, message):
    with pytest.raises(PlanError, match=message):
        check_keep_blocks(keep, 4)
