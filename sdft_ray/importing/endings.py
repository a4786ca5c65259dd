"""The generation config of an imported model: generation has to stop where the chat template ends a turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.errors import ModelError
from sdft_ray.models.json_file import read_json_object

GENERATION_CONFIG = "generation_config.json"


def write_generation_config(directory: Path, config: dict[str, Any], end_ids: Sequence[int]) -> list[str]:
    """Complete `generation_config.json` in `directory` by every token that ends a turn; returns notes.

    These are the tokens of the file itself and of config.json, `end_ids`, and that of the chat template.
    """
    path = directory / GENERATION_CONFIG
    known = read_json_object(path) if path.is_file() else {}
    fields = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
              if config.get(name) is not None}  # fmt: skip
    tokenizer: Any = load_tokenizer(directory)
    notes, turn = _end_of_turn(tokenizer)
    ends = [*_ids(known.get("eos_token_id")), *_ids(fields.get("eos_token_id")), *end_ids, *_ids(turn)]
    ends = list(dict.fromkeys(ends or _ids(tokenizer.eos_token_id)))
    if turn is not None and turn not in {*_ids(known.get("eos_token_id")), *_ids(fields.get("eos_token_id"))}:
        token = tokenizer.convert_ids_to_tokens(turn)
        notes.append(f"{token} ends a turn in the chat template: added to eos_token_id in {GENERATION_CONFIG}")
    content = {**fields, **known, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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


def _ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
