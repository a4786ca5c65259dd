"""Conversations of the shapes that data sets have, and the answers in them that can be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sdft_ray.data.messages import split_prompt
from sdft_ray.errors import DataError

Turns = Literal["last", "all"]
"""Which answers of a conversation become rows."""

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "observation": "tool",
    "ipython": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
"""Names of roles in data sets -> those of chat templates; `call` is an assistant's message that only calls a tool."""
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
_PAIRS = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("instruction", "output"),
          ("question", "answer"), ("prompt", "response"), ("query", "response"))  # fmt: skip
"""Keys of question and answer, where one object holds both."""
_TEXT_PARTS = {"text", "input_text", "output_text"}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Answered(NamedTuple):
    """One row: what was asked (see `data.messages`), and the answer."""

    instruction: str
    context: str
    reference: str


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages in column `name`, with the roles `system`, `user`, `assistant` and `tool`.

    A list (or its JSON) of messages by `role` and `content`, `from` and `value`, of pairs of question and answer, or
    of texts that the user and the assistant write in turn. Tool calls are `{"type": "function", "function": {"name",
    "arguments"}}` with arguments as an object. An answer that is not to be trained on has `weight` 0.

    Raises `DataError` without the place of the row.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"`{name}` is not valid JSON", "write it as a list of messages") from None
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list):
        raise DataError(f"`{name}` must be a list of messages, not {kind_of(value)}", "write `role` and `content`")
    if value and all(isinstance(item, str) for item in value):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(value, 1):
        try:
            messages += _read_item(item)
        except DataError as error:
            raise DataError(f"message {number} of `{name}` {error.message}", error.hint) from None
    return _linked(messages)


def _linked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With ids of tool calls where there are none, and the name and the call behind each result, in their order.

    Some templates refuse messages without them. Nine letters and digits are what the strictest accept.
    """
    open_calls: list[dict[str, Any]] = []
    number = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            number += 1
            call.setdefault("id", f"call{number:05d}")
            open_calls.append(call)
        if message["role"] == "tool" and open_calls:
            known = next((call for call in open_calls if call["id"] == message.get("tool_call_id")), open_calls[0])
            open_calls.remove(known)
            message.setdefault("tool_call_id", known["id"])
            message.setdefault("name", known["function"]["name"])
    return messages


def _read_item(item: Any) -> list[dict[str, Any]]:
    """One message, or two of a pair."""
    if isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return pair(*item)
    if not isinstance(item, Mapping):
        raise DataError(f"must be an object, not {kind_of(item)}", "write `role` and `content`")
    role = next((item[key] for key in _ROLE_KEYS if item.get(key) is not None), None)
    if role is None:
        for question, answer in _PAIRS:
            if isinstance(item.get(question), str) and isinstance(item.get(answer), str):
                return pair(item[question], item[answer])
        raise DataError(f"has no role (its fields: {', '.join(item) or 'none'})", "write `role` and `content`")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise DataError(f"has the unknown role {role!r}", "use system, user, assistant or tool")
    content = next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), "")
    if known == "call":
        return [{"role": "assistant", "content": "", "tool_calls": _calls_in_text(_text(content))}]
    return [_message(known, _text(content), item)]


def pair(question: str, answer: str) -> list[dict[str, Any]]:
    """The two messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(role: str, text: str, item: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": text}
    if role == "assistant":
        calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else [])
        if calls:
            message["tool_calls"] = [_call(call) for call in _listed(calls)]
        if thought := next((item[key] for key in _THOUGHTS if item.get(key)), ""):
            message["reasoning_content"] = _text(thought)
        if item.get("weight") == 0 or item.get("train") is False:
            message["weight"] = 0
    kept = {"user": ("name",), "tool": ("name", "tool_call_id")}.get(role, ())
    return message | {key: item[key] for key in kept if isinstance(item.get(key), str) and item[key]}


def _text(content: Any) -> str:
    """The text of a message, or of its parts one after the other."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"has {kind_of(content)} as content, not text", "write it as a string")
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else "?") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in _TEXT_PARTS:
            raise DataError(f"has a part of type {kind!r}", "remove rows with anything but text")
        if not isinstance(text, str):
            raise DataError(f"has a text part that is {kind_of(text)}", "write its `text` as a string")
        texts.append(text)
    return "".join(texts)


def _listed(value: Any) -> list[Any]:
    value = _parsed(value, "tool_calls")
    return value if isinstance(value, list) else [value]


def _calls_in_text(text: str) -> list[dict[str, Any]]:
    """Of a message whose role says that its text is a call."""
    return [_call(call) for call in _listed(text)]


def _call(call: Any) -> dict[str, Any]:
    """The function of a call, and its id if it has one; most templates want the arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("has a tool call without the name of a function", "write {name, arguments}")
    arguments = _parsed(function.get("arguments") or function.get("parameters") or {}, "the arguments of a tool call")
    if not isinstance(arguments, Mapping):
        raise DataError("has a tool call whose arguments are no object", "write them as a JSON object")
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}, **own}


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"has {what} that are not valid JSON: {value[:60]!r}", "write them as JSON") from None


# --- what can be trained on ---------------------------------------------------------------------------------


def answered(messages: Sequence[dict[str, Any]], turns: Turns) -> tuple[list[Answered], list[str]]:
    """The rows of a conversation, in order, and for each answer that is left out the reason.

    `last` gives at most one row, whose answer is the last message; `all` one for each answer of the assistant. What
    follows an answer is never part of its row.
    """
    if not messages:
        return [], ["the conversation is empty"]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rows, reasons = [], []
    if messages[-1]["role"] != "assistant":
        reasons.append(f"the conversation ends with a {messages[-1]['role']} message")
        places = [] if turns == "last" else places
    for place in places[-1:] if turns == "last" else places:
        if why := _why_not(messages[:place], messages[place]):
            reasons.append(why)
            continue
        rows.append(Answered(*split_prompt(_plain(messages[:place])), messages[place]["content"]))
    return rows, reasons


def num_answers(messages: Iterable[Mapping[str, Any]]) -> int:
    """How many messages are the assistant's, with text."""
    return sum(message["role"] == "assistant" and bool(message["content"].strip()) for message in messages)


def _why_not(prompt: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]) -> str:
    """Why an answer cannot be trained on, or ""."""
    if "weight" in answer:
        return "the answer has weight 0"
    if "tool_calls" in answer:
        return "the answer calls a tool"
    if not answer["content"].strip():
        return "the answer is empty"
    if "reasoning_content" in answer:
        return "the answer has thoughts in a field of their own, not in its text"
    asked = [message for message in prompt if message["role"] == "user"]
    if not asked or not asked[-1]["content"].strip():
        return "there is no question"
    return ""


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Without weights, which no template knows."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
