"""The tokenizer in a GGUF file, rebuilt by transformers, with what its reader leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from sdft_ray.errors import ModelError

_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
"""Ways to split text before merges, by their names in llama.cpp. transformers splits as GPT-2 where it knows none."""


def rebuilt(folder: Path, file: str, fields: Mapping[str, Any], context_tokens: int) -> Any:
    """The tokenizer of the GGUF file `file` in `folder`, whose metadata are `fields`. Raises `ModelError`."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    adds = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3)),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    }
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), gguf_file=file, model_max_length=context_tokens, local_files_only=True,
            trust_remote_code=False, **adds,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file}: its tokenizer cannot be read: {error}", "import the original model") from None
    if kind == "gpt2" and pre in (*_LLAMA3, "tekken"):
        tokenizer.backend_tokenizer.model.ignore_merges = True  # a word of the vocabulary is one token in any case
    if kind == "gpt2" and pre in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.init_kwargs.pop("local_files_only", None)  # it would be written to tokenizer_config.json
    return tokenizer


def splitting_note(fields: Mapping[str, Any]) -> list[str]:
    """A note where nobody knows how the original tokenizer splits text before it merges tokens."""
    kind = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or kind in (*_SINGLE_DIGITS, *_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
        return []
    return [
        f"the file says that text is split in the way {kind or '(none)'!r}, which transformers does not know: it is "
        "split as for GPT-2, and some texts may get other tokens than with the original tokenizer"
    ]
