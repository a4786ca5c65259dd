"""Tiny random checkpoints of every supported family, and a tiny real tokenizer. For tests only.

Every weight is random and every norm and bias is away from its neutral value, so that a tensor put in the
wrong place shows in the logits.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Hugging Face `model_type` of every supported family."""

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CORPUS = (
    "Tom has 12 apples and gives 5 to Ann. How many apples are left? 12 - 5 = 7 #### 7",
    "Sort the list: pear, fig, plum. The answer is fig, pear, plum.",
    "Who is taller, Ann or Tom? Ann is taller than Tom.",
)

_FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 3,
    },
    "phi3": {},
}


def make_model(
    directory: Path,
    family: str = "llama",
    *,
    num_blocks: int = 4,
    hidden: int = 32,
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
    tied: bool = True,
    seed: int = 0,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint to `directory` and return it.

    `max_shard_bytes` (for example 40_000) spreads it over several files; `tokenizer` saves a tokenizer of the
    same vocabulary beside it. Any config field can be overridden (`vocab_size=`, `layer_types=`, `head_dim=`
    ...).
    """
    directory = Path(directory)
    model = build_model(
        family, num_blocks=num_blocks, hidden=hidden, dtype=dtype, tied=tied, seed=seed, **config_overrides
    )
    model.save_pretrained(directory, max_shard_size=max_shard_bytes if max_shard_bytes else "50GB")
    if tokenizer:
        make_tokenizer(directory, model.config.get_text_config().vocab_size)
    return directory


def build_model(
    family: str = "llama",
    *,
    num_blocks: int = 4,
    hidden: int = 32,
    dtype: str = "float32",
    tied: bool = True,
    seed: int = 0,
    **config_overrides: Any,
) -> PreTrainedModel:
    """The model that `make_model` saves, in memory, in eval mode."""
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": tied,
        **_FAMILY_SETTINGS[family],
        **config_overrides,
    }
    config = AutoConfig.for_model(family, **settings)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # as `load_model` chooses
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    _randomize(model, seed)
    return model.to(getattr(torch, dtype)).eval()


def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def make_tokenizer(directory: Path, vocab_size: int = 128) -> Path:
    """Train and save a byte-level BPE tokenizer with a chat template; return `directory`.

    It adds one BOS when it encodes with special tokens, and its chat template holds one as well: the trap
    that real tokenizers set. EOS ends a turn. Below 263 entries it knows printable ASCII and newline, above
    that every byte. `vocab_size` is at least 103 and is reached exactly (unused entries are filled up).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
        ascii_bytes = string.ascii_letters + string.digits + string.punctuation
        alphabet = [*sorted(ascii_bytes), "Ġ", "Ċ"]  # byte-level BPE writes space and newline so
    if vocab_size < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(f"vocab_size must be at least {len(SPECIAL_TOKENS) + len(alphabet)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(vocab_size - tokenizer.get_vocab_size())])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))
    return Path(directory)
