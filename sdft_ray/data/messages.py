"""What comes before an answer: one question, or the messages of a conversation.

In a table a prompt is two columns: `instruction`, the text of its last user message, which rewriting may wrap, and
`context`, the JSON of all its messages with that text left empty; "" where the prompt is that text alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
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


def with_arguments_as_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as JSON text."""

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def prompt_of(instruction: str, context: str) -> Prompt:
    """The prompt of a row: `instruction` takes its place among the messages of `context`.

    `instruction` need not be the row's own: a rewriting prompt goes to the same place.
    """
    if not context:
        return instruction
    messages: list[dict[str, Any]] = json.loads(context)
    messages[_last_user(messages)]["content"] = instruction
    return messages


def row_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row of `SEED_SCHEMA` or `SELECTED_SCHEMA`."""
    return prompt_of(row["instruction"], row["context"])


def split_prompt(messages: Sequence[Message]) -> tuple[str, str]:
    """The inverse of `prompt_of`: `instruction` and `context` of messages, of which at least one is the user's."""
    place = _last_user(messages)
    instruction: str = messages[place]["content"]
    if len(messages) == 1 and messages[0].keys() == {"role", "content"}:
        return instruction, ""
    rest = [{**message, "content": ""} if index == place else message for index, message in enumerate(messages)]
    return instruction, json.dumps(rest, ensure_ascii=False, separators=(",", ":"))


def context_texts(context: str) -> list[str]:
    """The texts of a context, and the arguments of its tool calls as JSON."""
    return [text for text in _texts(json.loads(context)) if text] if context else []


def shape_of(context: str) -> tuple[Any, ...]:
    """What a template may refuse in a context: its roles in order, and which messages call tools."""
    return tuple((m["role"], "tool_calls" in m) for m in json.loads(context)) if context else ()


def left_out_of(messages: Sequence[Message], rendered: str) -> str:
    """What of a prompt a chat template has left out of what it `rendered`, in words; "" if nothing.

    White space does not count, nor how JSON spells a text. Answers do not: templates take thoughts out of earlier ones.
    """
    text = "".join(rendered.split())
    for message in messages:
        said = message["content"]
        spellings = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
        if message["role"] != "assistant" and not any("".join(way.split()) in text for way in spellings):
            return f"the {message['role']} message {said[:40]!r}"
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                return f"the call of the tool {call['function']['name']!r}"
    return ""


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield json.dumps(call["function"]["arguments"], ensure_ascii=False)


def _last_user(messages: Sequence[Message]) -> int:
    return max(index for index, message in enumerate(messages) if message["role"] == "user")
