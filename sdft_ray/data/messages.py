"""What comes before an answer: one question, or the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""`role` and `content`; one of the assistant may have `tool_calls`, one of a tool `name` and `tool_call_id`."""
Prompt = str | Sequence[Message]
"""The text of one user message, or all messages before the answer."""


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages of a prompt, as chat templates take them."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]
