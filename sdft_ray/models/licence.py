"""Detects the licence of a model from its files or its model card on the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_ray.models.companions import companions, is_licence

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_HEADINGS = (
    (re.compile(r"apache license,? version 2\.0"), "apache-2.0"),
    (re.compile(r"mit license|permission is hereby granted, free of charge"), "mit"),
    (re.compile(r"llama 4 community license"), "llama4"),
    (re.compile(r"llama 3\.([123]) community license"), r"llama3.\1"),
    (re.compile(r"llama 3 community license"), "llama3"),
    (re.compile(r"llama 2 community license"), "llama2"),
    (re.compile(r"gemma terms of use"), "gemma"),
)
"""Opening words of well-known licences, in lower case with single spaces, and their identifiers on the Hub."""
_HEADING_CHARACTERS = 600
"""A licence named further down is quoted or compared with, not granted."""


@dataclass(frozen=True)
class Licence:
    """A licence by its Hub identifier (`apache-2.0`, `llama3.1`); `other` has a name, a link or both."""

    identifier: str
    name: str = ""
    link: str = ""
    origin: str = ""
    """Source of the information; completes the phrase "according to"."""


def find_licence(directories: Sequence[Path], hub: str | None = None, commit: str | None = None) -> Licence | None:
    """The licence of a model with files in `directories`, or of the Hub model `hub` at `commit`; None if unknown.

    Model cards have precedence over licence files, and files over the network, which is used only for a Hub model. An
    unreachable Hub counts as unknown.
    """
    for directory in directories:
        if licence := _from_card_file(directory / "README.md"):
            return licence
    for directory in directories:
        for name in filter(is_licence, companions(directory)):
            if licence := _from_text(directory / name):
                return licence
    return _from_hub(hub, commit) if hub else None


def _from_card_file(path: Path) -> Licence | None:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        return None
    return _from_fields(card.data.to_dict(), "the teacher's model card")


def _from_hub(hub: str, commit: str | None) -> Licence | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        data = HfApi().model_info(hub, revision=commit, timeout=10).card_data
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None
    return _from_fields(data.to_dict(), "the teacher's page on the hub") if data else None


def _from_fields(fields: dict[str, Any], origin: str) -> Licence | None:
    identifier, name, link = (fields.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(identifier, list) and len(identifier) == 1:
        identifier = identifier[0]
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier) or identifier == "unknown":
        return None
    candidates = {"name": name, "link": link} if identifier == "other" else {}
    details = {key: value for key, value in candidates.items() if isinstance(value, str)}
    return Licence(identifier, **details, origin=origin) if identifier != "other" or details else None


def _from_text(path: Path) -> Licence | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    heading = " ".join(text.lower().split())[:_HEADING_CHARACTERS]
    for pattern, identifier in _HEADINGS:
        if match := pattern.search(heading):
            return Licence(match.expand(identifier), origin=f"the file {path.name}")
    return None
