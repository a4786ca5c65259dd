"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from tests.support.tiny import BOS_ID, EOS_ID, PAD_ID

ARCHITECTURES = {
    "llama": (MODEL_ARCH.LLAMA, "llama"),
    "mistral": (MODEL_ARCH.LLAMA, "llama"),
    "qwen2": (MODEL_ARCH.QWEN2, "qwen2"),
    "qwen3": (MODEL_ARCH.QWEN3, "qwen3"),
    "gemma2": (MODEL_ARCH.GEMMA2, "gemma2"),
    "gemma3_text": (MODEL_ARCH.GEMMA3, "gemma3"),
    "phi3": (MODEL_ARCH.PHI3, "phi3"),
}
"""Hugging Face `model_type` -> architecture in GGUF."""


def write_gguf(
    model: Any,
    path: Path,
    *,
    tokenizer: Path | None,
    kind: str = "F32",
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    chat_template: str | None = None,
    architecture: str | None = None,
    pre: str = "gpt-2",
) -> Path:
    """Write a transformers model. `fields` (after the architecture) and `tensors` are added; `kind` is a ggml type."""
    config = model.config
    arch, name = ARCHITECTURES[config.model_type]
    name = architecture or name
    writer = GGUFWriter(path, name)
    said = _fields(config) | dict(fields or {})
    for field, value in said.items():
        _add(writer, f"{name}.{field}", value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, chat_template, pre)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = _converted(config, key, tensor.float().numpy())
        _add_tensor(writer, names.get_name(key, (".weight", ".bias")), weight, kind)
    for key, array in (tensors or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(directory: Path, path: Path, *, pre: str) -> Path:
    """Write the byte-level tokenizer in `directory` alone."""
    writer = GGUFWriter(path, "llama")
    _add_tokenizer(writer, directory, None, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _fields(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if config.model_type in ("llama", "mistral", "phi3"):
        said["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    else:
        said |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type in ("gemma2", "gemma3_text", "phi3") and config.sliding_window:
        said["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma3_text":
        said["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if config.model_type == "gemma2":
        said["attn_logit_softcapping"] = config.attn_logit_softcapping
        said["final_logit_softcapping"] = config.final_logit_softcapping
    return said


def _converted(config: Any, key: str, weight: np.ndarray) -> np.ndarray:
    """Llama's rotary channels are interleaved in GGUF; Gemma's norms are stored with their one."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, num in heads.items():
        if config.model_type in ("llama", "mistral") and part in key:
            rest = weight.shape[1:]
            return weight.reshape(num, 2, weight.shape[0] // num // 2, *rest).swapaxes(1, 2).reshape(weight.shape)
    return weight + 1 if config.model_type.startswith("gemma") and key.endswith("norm.weight") else weight


def _add_tensor(writer: GGUFWriter, name: str | None, weight: np.ndarray, kind: str) -> None:
    assert name is not None
    if weight.ndim == 1 or kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))
    elif kind == "F16":
        writer.add_tensor(name, weight.astype(np.float16))
    else:
        dtype = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(weight), dtype), raw_dtype=dtype)


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _add_tokenizer(writer: GGUFWriter, directory: Path, chat_template: str | None, pre: str) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([{True: 3, False: 4}.get(special.get(token), 1) for token in tokens])  # type: ignore[arg-type]
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def logits_of(model: Any, num_tokens: int = 24) -> torch.Tensor:
    """Logits of a fixed sequence, in float32."""
    ids_BT = torch.arange(num_tokens)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        return model(input_ids=ids_BT, use_cache=False).logits.float()
