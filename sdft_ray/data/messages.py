"""What comes before an answer: one question, or the messages of a conversation."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template is given beside the messages.

    `system` is the text of a system turn for conversations that do not begin with one. `arguments` go to the template,
    for example `{"enable_thinking": False}`. A template that prints the date prints `date`, at midnight; None: now.
    """

    system: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the system turn."""
        if not self.system or (messages and messages[0].get("role") in ("system", "developer")):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def for_template(self) -> dict[str, Any]:
        """Keyword arguments of `apply_chat_template`."""
        if self.date is None:
            return dict(self.arguments)
        moment = datetime.datetime.combine(self.date, datetime.time())
        return {"strftime_now": moment.strftime, **self.arguments}
