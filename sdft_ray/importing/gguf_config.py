"""The config of a model from a GGUF file: what transformers' reader leaves out of it.

transformers 5.19 takes the sizes, the base of the rotary frequencies and (Gemma) the window. Everything else that the
file says about the computation is compared with the config here: written into it, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdft_ray.errors import ModelError

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (LLAMA3, LONG, SHORT)
"""Tensors of a GGUF file that are no weights: divisors of the rotary frequencies. transformers drops them."""

_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Fields of a GGUF file (after the architecture) and of config.json that mean the same."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.type": ("none", ""),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
}
"""Values that change nothing. Any other value of these fields is refused, unless `_rope` has dealt with it."""

_27B = (("gemma2", 46), ("gemma3_text", 62))
"""Gemma 27B by family and number of blocks, as llama.cpp recognizes it: attention is scaled by hidden size / heads
there, and by the size of a head in all other sizes. No field of the file says so.
"""

_ORIGINAL = "import the original checkpoint instead"
_LLAMA3_SETTINGS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def completed(
    config: Mapping[str, Any], fields: Mapping[str, Any], rope: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], list[str]]:
    """The config with all that the metadata `fields` say, and notes on fields that nothing here reads.

    `rope` are the tensors of `ROPE_TENSORS` that the file has. Raises `ModelError` for a setting that this family of
    transformers cannot express.
    """
    architecture = str(fields["general.architecture"])
    said = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()
            if name.startswith(f"{architecture}.")}  # fmt: skip
    result = {**config}
    for name, field in _FIELDS.items():
        if name in said:
            _set(result, field, said[name], f"{architecture}.{name}")
    if "query_pre_attn_scalar" in result:
        is_27b = (result["model_type"], result["num_hidden_layers"]) in _27B
        per_head = result["hidden_size"] // result["num_attention_heads"]
        result["query_pre_attn_scalar"] = per_head if is_27b else result["head_dim"]
    done = {*_FIELDS, "rope.freq_base", *_rope(result, said, rope), *_windows(result, said)}
    unread = []
    for name in sorted(set(said) - done):
        if name in _NEUTRAL and said[name] not in _NEUTRAL[name]:
            raise ModelError(
                f"the GGUF file sets {architecture}.{name} to {said[name]!r}, which transformers drops",
                _ORIGINAL,
            )
        if name not in _NEUTRAL:
            unread.append(f"not read from the file: {architecture}.{name} = {str(said[name])[:60]}")
    return result, unread


def _set(config: dict[str, Any], field: str, value: Any, name: str) -> None:
    derived = config["hidden_size"] // config["num_attention_heads"]
    before = config.get(field, derived if field == "head_dim" else None)
    if before == value:
        return
    if field not in config or isinstance(before, list):
        raise ModelError(
            f"the GGUF file sets {name} to {value!r}, which {config['model_type']} cannot have",
            _ORIGINAL,
        )
    config[field] = value


def _windows(config: dict[str, Any], said: Mapping[str, Any]) -> set[str]:
    """Which blocks have a window, and the base of their rotary frequencies; returns the fields that are dealt with."""
    done = set()
    pattern, kinds = said.get("attention.sliding_window_pattern"), config.get("layer_types")
    if pattern is not None and kinds is not None:
        every = [bool((block + 1) % pattern) for block in range(len(kinds))] if isinstance(pattern, int) else pattern
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in every]
        done.add("attention.sliding_window_pattern")
    parameters = config["rope_parameters"]
    if "rope.freq_base_swa" in said and "sliding_attention" in parameters:
        windowed = {**parameters["sliding_attention"], "rope_theta": said["rope.freq_base_swa"]}
        config["rope_parameters"] = {**parameters, "sliding_attention": windowed}
        done.add("rope.freq_base_swa")
    return done


def _rope(config: dict[str, Any], said: Mapping[str, Any], rope: Mapping[str, np.ndarray]) -> set[str]:
    """Write scaled rotary frequencies into the config; returns the fields that are dealt with."""
    parameters = {**config["rope_parameters"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = said.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if "partial_rotary_factor" not in parameters:
            raise ModelError(
                f"the GGUF file rotates {rotated} of {head_dim} channels of a head, which {config['model_type']} in "
                "transformers cannot",
                _ORIGINAL,
            )
        parameters["partial_rotary_factor"] = rotated / head_dim
    done = {"rope.dimension_count"}
    config["rope_parameters"] = parameters
    kind = said.get("rope.scaling.type", "none")
    if LLAMA3 in rope:
        config["rope_parameters"] = _llama3(config, rope[LLAMA3])
    elif LONG in rope and SHORT in rope:
        config["rope_parameters"] = _longrope(config, said, rope)
        done |= {name for name in said if name.startswith("rope.scaling.")}
    elif kind in ("linear", "yarn"):
        config["rope_parameters"] = _scaled(config, said, kind)
        done |= {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"}
    return done


def _llama3(config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1 and later. The file has the divisors that follow from the settings: these are found, and compared."""
    plain = config["rope_parameters"]
    found = {**plain, **_LLAMA3_SETTINGS, "rope_type": "llama3", "factor": float(np.round(divisors.max(), 4))}
    model = AutoConfig.for_model(**{**config, "rope_parameters": found})
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model, None)
    steps = np.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    if inverse.shape != divisors.shape or not np.allclose(
        inverse.numpy(), plain["rope_theta"] ** -steps / divisors, rtol=1e-4
    ):
        raise ModelError(
            f"the GGUF file scales its rotary frequencies ({LLAMA3}) unlike Llama 3.1 to 3.3; transformers drops that",
            _ORIGINAL,
        )
    return found


def _longrope(config: dict[str, Any], said: Mapping[str, Any], rope: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Phi-3 and Phi-4 with long contexts."""
    original = said.get("rope.scaling.original_context_length", config.get("original_max_position_embeddings"))
    if config["model_type"] != "phi3" or original is None:
        raise ModelError(f"the GGUF file has {LONG}, which {config['model_type']} cannot use", _ORIGINAL)
    config["original_max_position_embeddings"] = original
    found = {
        **config["rope_parameters"],
        "rope_type": "longrope",
        "long_factor": [float(value) for value in rope[LONG]],
        "short_factor": [float(value) for value in rope[SHORT]],
        "original_max_position_embeddings": original,
    }
    factor = said.get("rope.scaling.attn_factor")
    return {**found, "attention_factor": float(factor)} if factor else found


def _scaled(config: Mapping[str, Any], said: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Linear and YaRN scaling, as transformers writes them. In Gemma 3 they apply to the blocks without a window."""
    if "rope.scaling.factor" not in said or config["model_type"] == "phi3":
        raise ModelError(f"the GGUF file has rotary scaling of the kind {kind!r} that cannot be expressed", _ORIGINAL)
    extra: dict[str, Any] = {"rope_type": kind, "factor": float(said["rope.scaling.factor"])}
    if kind == "yarn":
        length = said.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        extra["original_max_position_embeddings"] = length
    parameters = config["rope_parameters"]
    if "full_attention" in parameters:
        return {**parameters, "full_attention": {**parameters["full_attention"], **extra}}
    return {**parameters, **extra}
