"""The generation config of an imported model: generation has to stop where the chat template ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_ray.data.chat import ChatFormat, end_of_text, load_tokenizer
from sdft_ray.errors import ModelError
from sdft_ray.models.generation_config import GENERATION_CONFIG, add_end_ids


def write_generation_config(directory: Path, config: dict[str, Any], end_ids: Sequence[int]) -> list[str]:
    """Complete `generation_config.json` in `directory` by every token that ends a turn; returns notes.

    These are the tokens of the file itself and of config.json, `end_ids`, and that of the chat template.
    """
    fields = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
              if config.get(name) is not None}  # fmt: skip
    tokenizer: Any = load_tokenizer(directory)
    notes, turn = _end_of_turn(tokenizer)
    named = add_end_ids(directory, [*end_ids, *([] if turn is None else [turn])], fields)
    if not named and not end_ids and turn is None:
        add_end_ids(directory, sorted(end_of_text(tokenizer)))
    if turn is not None and turn not in named:
        token = tokenizer.convert_ids_to_tokens(turn)
        notes.append(f"{token} ends a turn in the chat template: added to eos_token_id in {GENERATION_CONFIG}")
    return notes


def _end_of_turn(tokenizer: Any) -> tuple[list[str], int | None]:
    """Notes, and the token that closes an answer, the last one where several follow one another."""
    if not getattr(tokenizer, "chat_template", None):
        return [
            "there is no chat template: this is a base model, or the source lost it; put the model's "
            "chat_template.jinja into the folder before it is used with chats"
        ], None
    try:
        return [], ChatFormat(tokenizer).end_ids[-1]
    except ModelError as reason:
        return [reason.message], None
