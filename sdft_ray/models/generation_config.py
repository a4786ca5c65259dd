"""generation_config.json: the tokens that end a generation, in any engine that reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.models.json_file import read_json_object

GENERATION_CONFIG = "generation_config.json"


def add_end_ids(directory: Path, end_ids: Sequence[int], defaults: Mapping[str, Any] | None = None) -> set[int]:
    """Put `end_ids` behind those that the file in `directory` names; returns the ids that were named before.

    `defaults` are fields that the file lacks, such as the ids of config.json. A file that names all ids stays as it is.
    """
    path = directory / GENERATION_CONFIG
    known = read_json_object(path) if path.is_file() else {}
    content = {**(defaults or {}), **known}
    named = list(dict.fromkeys([*_ids(known.get("eos_token_id")), *_ids((defaults or {}).get("eos_token_id"))]))
    ids = list(dict.fromkeys([*named, *end_ids]))
    if ids:
        content["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    if content != known or not path.is_file():
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return set(named)


def _ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
