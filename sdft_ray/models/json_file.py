"""Reads the JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_ray.errors import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelError` if it cannot be read, is malformed, or is not an object."""
    again = "download or copy that file again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:  # malformed JSON, or not UTF-8
        raise ModelError(f"{path} is not JSON: {reason}", again) from None
    except OSError as reason:
        raise ModelError(f"cannot read {path}: {reason.strerror}", "check the path and its permissions") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not contain a JSON object", again)
    return content
