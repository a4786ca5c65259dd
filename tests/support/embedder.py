"""A tiny random model of sentence embeddings, for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tests.support.tiny import PAD_ID, make_tokenizer

MAX_TOKENS = 48


def make_embedder(directory: Path, *, seed: int = 0, pooling: str = "", **config: Any) -> Path:
    """Write a BERT of two layers, every weight random, and return its directory.

    With `pooling` (`mean`, `cls`, `max`) the files of sentence-transformers lie beside it.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": MAX_TOKENS, "pad_token_id": PAD_ID, **config,
    }  # fmt: skip
    model = BertModel(BertConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    make_tokenizer(directory)
    if pooling:
        paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(paths.items())
        ]
        flags = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
        modes = {f"pooling_mode_{flag}": mode == pooling for mode, flag in flags.items()}
        (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        (directory / "1_Pooling").mkdir()
        written = {"word_embedding_dimension": 32, "include_prompt": True, **modes}
        (directory / "1_Pooling/config.json").write_text(json.dumps(written), encoding="utf-8")
    return directory
