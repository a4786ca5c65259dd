"""URLs as they may be shown: without the secrets that people write into them."""

from __future__ import annotations

from urllib.parse import urlsplit


def without_secrets(value: str) -> str:
    """A URL without user, password, query and fragment; anything else as it is."""
    if "://" not in value:
        return value
    parts = urlsplit(value)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
