"""Conversations as files hold them."""

from __future__ import annotations


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(texts[::2], texts[1::2], strict=True)]
