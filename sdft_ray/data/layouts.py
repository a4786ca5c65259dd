"""Which columns of a row are the question, the answer, and what else belongs to the prompt.

The names that data sets use are recognised where they can be read in one way; a mapping settles the others. A column
of text that belongs to the prompt is joined to it or refused, never dropped.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdft_ray.data.conversations import kind_of, pair, read_messages
from sdft_ray.errors import DataError

COLUMNS = (
    "id", "instruction", "reference", "answer_kind", "check", "family", "messages", "context", "system", "history",
)  # fmt: skip
"""Our names, on the left of a mapping. `context` is further text of the question, `history` earlier questions and
answers."""

_CONVERSATIONS = ("messages", "conversations", "conversation", "contents")
_LESS_CLEAR = ("dialogue", "dialog", "data")  # conversations where nothing else is a question
_QUESTIONS = ("instruction", "question", "query", "prompt", "problem")
_INPUTS = ("input", "inputs")
_SPEAKERS = ("human", "user")
_LESS_CLEAR_QUESTIONS = (*_INPUTS, *_SPEAKERS)  # the question where there is no other
_ADDITIONS = ("context", *_INPUTS, "passage", "document")
_REFERENCES = ("reference", "reference_response")
_ANSWERS = (
    "output", "outputs", "response", "answer", "completion", "solution", "target", "targets", "generated_solution",
    "ideal", "assistant",
)  # fmt: skip
_SYSTEMS = ("system", "system_prompt", "system_message")
_HISTORIES = ("history",)
_TOOLS = ("tools", "functions")
_NEEDED = ("choices", "options")  # a question with options cannot be answered without them
_OURS = ("id", "answer_kind", "check", "family")


@dataclass(frozen=True)
class Layout:
    """Columns by role; "" where there is none. Without a question the answer is plain text."""

    conversation: str = ""
    question: str = ""
    addition: str = ""
    system: str = ""
    history: str = ""
    answer: str = ""
    tools: str = ""
    same: tuple[str, ...] = ()
    """Columns whose text must be repeated in the conversation or question: they are not read."""
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`instruction` and `input` ask, `output` answers."""
        if not self.conversation and not self.question:
            return f"`{self.answer}` is plain text"
        asks = (self.system, self.history, self.conversation or self.question, self.addition)
        names = [f"`{name}`" for name in asks if name]
        if self.conversation:
            return f"{' and '.join(names)} hold the conversation" if names[1:] else f"{names[0]} holds the conversation"
        return f"{' and '.join(names)} {'ask' if names[1:] else 'asks'}, `{self.answer}` answers"


@dataclass(frozen=True)
class Mapped:
    """A mapping of our names to columns (a path such as `answers.text.0` goes into a column), and what is read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    plain_text: bool = False
    """Rows may be text without a question."""

    def layout(self, record: Mapping[str, Any]) -> Layout:
        """How a row is read, by which of its columns are filled. Raises `DataError` where that is not clear."""
        filled = [name for name, value in record.items() if value is not None and value != "" and value != []]
        return _Choice(self, record, filled).layout()


class _Choice:
    """The choice of columns for rows with the same columns filled."""

    def __init__(self, mapped: Mapped, record: Mapping[str, Any], filled: Sequence[str]) -> None:
        self._columns, self._plain_text = mapped.columns, mapped.plain_text
        self._record, self._filled = record, filled
        taken = {name.split(".")[0] for name in self._columns.values()}
        self._free = [name for name in filled if name not in taken]
        self._by_lower = {name.lower(): name for name in reversed(list(record)) if name not in taken}

    def layout(self) -> Layout:
        columns = self._columns
        around = Layout(
            system=self._one("system", _SYSTEMS),
            history=self._one("history", _HISTORIES),
            tools=next(iter(self._those(_TOOLS)), ""),
        )
        conversation = self._conversation()
        if conversation:
            same = () if "messages" in columns else tuple(self._those((*_QUESTIONS, *_REFERENCES, *_ANSWERS)))
            return self._named(replace(around, conversation=conversation, same=same))
        question, same = self._question()
        if not question and not self._plain_text:
            raise self._missing("instruction")
        answer = self._answer(question)
        if not answer:
            raise self._missing("reference")
        if not question:
            return self._named(Layout(answer=answer))
        addition = self._addition(question)
        for name in self._those(_NEEDED):
            if "context" not in columns:
                raise DataError(
                    f"`{name}` would be left out of the question",
                    f"write the options into `{question}`, or set `columns: {{context: ''}}` to leave them out",
                )
        return self._named(replace(around, question=question, addition=addition, answer=answer, same=same))

    def _named(self, layout: Layout) -> Layout:
        """With the columns that nothing reads."""
        read = {value.split(".")[0] for value in vars(layout).values() if isinstance(value, str)} | {*layout.same}
        own = {self._columns.get(name, name).split(".")[0] for name in _OURS}
        unused = tuple(name for name in self._filled if name not in read | own)
        return replace(layout, unused=unused)

    def _conversation(self) -> str:
        if "messages" in self._columns:
            return self._mapped("messages")
        if {"instruction", "reference"} & self._columns.keys():
            return ""
        found = self._those(_CONVERSATIONS)
        if not found and not self._those((*_QUESTIONS, *_INPUTS)):
            found = self._those(_LESS_CLEAR)
        if len(found) > 1:
            raise _unclear("messages", found)
        if not found and not self._those((*_QUESTIONS, *_INPUTS, *_REFERENCES, *_ANSWERS, "text")):
            found = self._those(_CONVERSATIONS, empty=True)  # null or empty, in a row with nothing else
        return next(iter(found), "")

    def _question(self) -> tuple[str, tuple[str, ...]]:
        """The column of the question, and those that must say the same."""
        if "instruction" in self._columns:
            return self._mapped("instruction"), ()
        if self._plain_text and "reference" in self._columns:
            return next(iter(self._those(("instruction",))), ""), ()
        found = self._those(_QUESTIONS) or self._those(_INPUTS) or self._those(_SPEAKERS)
        if found:
            return found[0], tuple(found[1:])
        return next(iter(self._those((*_QUESTIONS, *_LESS_CLEAR_QUESTIONS), empty=not self._plain_text)), ""), ()

    def _answer(self, question: str) -> str:
        if "reference" in self._columns:
            return self._mapped("reference")
        found = self._those(_REFERENCES)[:1] or self._those(_ANSWERS)
        if len(found) > 1:
            raise _unclear("reference", found)
        if not found and self._plain_text and not question:
            found = self._those(("text",))
        return next(iter(found or self._those((*_REFERENCES, *_ANSWERS), empty=True)), "")

    def _addition(self, question: str) -> str:
        if "context" in self._columns:
            return self._mapped("context")
        found = [name for name in self._those(_ADDITIONS) if name != question]
        if len(found) > 1:
            raise _unclear("context", found)
        return next(iter(found), "")

    def _one(self, ours: str, names: Sequence[str]) -> str:
        if ours in self._columns:
            return self._mapped(ours)
        found = self._those(names)
        if len(found) > 1:
            raise _unclear(ours, found)
        return next(iter(found), "")

    def _mapped(self, ours: str) -> str:
        """The column that a mapping gives; "" where it says that there is none."""
        name = self._columns[ours]
        if name and name.split(".")[0] not in self._record:
            raise self._missing(ours)
        return name

    def _those(self, names: Sequence[str], *, empty: bool = False) -> list[str]:
        """The columns with these names, in this order, upper case or lower; with `empty` also those without text."""
        found = (self._by_lower.get(name) for name in names)
        return [name for name in found if name is not None and (empty or name in self._free)]

    def _missing(self, ours: str) -> DataError:
        name = self._columns.get(ours, ours)
        what = f"no column {name!r}" + (f" for {ours}" if name != ours else "")
        present = ", ".join(self._record) or "none"
        return DataError(f"{what} (columns: {present})", self._hint(ours, name))

    def _hint(self, ours: str, name: str) -> str:
        if ours == "reference" and (paths := list(_nested(self._record))):
            return f"give one text: `columns: {{{', '.join(paths)}}}`"
        chosen = self._those(("chosen",))
        is_conversation = bool(chosen) and isinstance(self._record[chosen[0]], list)
        if chosen and (is_conversation or ours == "reference"):
            role = "messages" if is_conversation else ours
            return f"of preferences, take the better answer: `columns: {{{role}: {chosen[0]}}}`"
        if near := difflib.get_close_matches(name, list(self._record), 1, cutoff=0.5):
            return f"did you mean `columns: {{{ours}: {near[0]}}}`?"
        return f"map `{ours}` to one of these columns"


def _nested(record: Mapping[str, Any]) -> Iterator[str]:
    """Mappings into the first column that holds an answer inside an object or a list of objects."""
    for name, value in record.items():
        place, inner = (f"{name}.0", value[0]) if isinstance(value, list) and value else (name, value)
        if not isinstance(inner, Mapping) or name.lower() in _QUESTIONS:
            continue
        answer = next((key for key in (*_REFERENCES, *_ANSWERS, "text") if key in inner), None)
        if answer is None:
            continue
        yield f"reference: {place}.{answer}" + (".0" if isinstance(inner[answer], list) else "")
        for addition in _ADDITIONS:
            if addition in inner:
                yield f"context: {place}.{addition}"
        return


def _unclear(ours: str, found: Sequence[str]) -> DataError:
    both = " and ".join(f"`{name}`" for name in found)
    return DataError(f"{both} could each be the {ours}", f"say which: `columns: {{{ours}: {found[0]}}}`")


# --- reading a row ------------------------------------------------------------------------------------------


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a place inside it (`instances.0.output`); None where there is none."""
    if path in record or "." not in path:
        return record.get(path)
    value: Any = record
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        else:
            value = value[int(key)] if isinstance(value, list) and key.isdigit() and int(key) < len(value) else None
    return value


def compose(record: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """All messages of a row, the answer last. Raises `DataError` without the place of the row."""
    if layout.conversation:
        messages = read_messages(value_at(record, layout.conversation) or [], layout.conversation)
    else:
        messages = [*_asked(record, layout), *_answers(record, layout)]
    if layout.history:
        messages = [*read_messages(value_at(record, layout.history), layout.history), *messages]
    system = text_of(record, layout.system) if layout.system else ""
    if system.strip():
        first = messages[0] if messages else {}
        if first.get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif first["content"].strip() != system.strip():
            raise DataError(
                f"`{layout.system}` differs from the system message of the conversation", "remove one of the two"
            )
    _check_same(record, layout, messages)
    return messages


def _asked(record: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    addition = text_of(record, layout.addition) if layout.addition else ""
    value = _decoded(value_at(record, layout.question))
    if _holds_messages(value):
        if addition.strip():
            raise DataError(f"`{layout.addition}` cannot be joined to a list of messages", "write it into the question")
        return read_messages(value, layout.question)
    question = text_of(record, layout.question, "instruction")
    if addition.strip() and addition.strip() not in question:
        question = f"{question}\n\n{addition}" if question.strip() else addition
    return [{"role": "user", "content": question}]


def _answers(record: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    value = _decoded(value_at(record, layout.answer))
    if _holds_messages(value):
        return read_messages(value, layout.answer)
    return pair("", text_of(record, layout.answer, "reference"))[1:]


def _decoded(value: Any) -> Any:
    """Messages that a column holds as JSON, else the value."""
    if not isinstance(value, str) or not value.startswith('[{"'):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return messages if all(isinstance(item, Mapping) and {"role", "from"} & item.keys() for item in messages) else value


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def text_of(record: Mapping[str, Any], path: str, ours: str = "") -> str:
    """The text at `path`; "" where there is none. Raises `DataError` for anything else than text."""
    value = value_at(record, path)
    if value is None:
        return ""
    if not isinstance(value, str):
        name = ours if ours and ours == path else f"{ours} (`{path}`)" if ours else f"`{path}`"
        raise DataError(f"{name} must be text, not {kind_of(value)}", _take_part(value, path, ours))
    return value


def _take_part(value: Any, path: str, ours: str) -> str:
    """What to do about a value that is no text: it may hold one."""
    key = next((key for key, part in value.items() if isinstance(part, str)), "") if isinstance(value, Mapping) else ""
    if isinstance(value, list) and value and isinstance(value[0], str):
        key = "0"
    if key and ours in ("", "instruction", "reference"):
        return f"take a part of it: `columns: {{{ours or 'context'}: {path}.{key}}}`"
    return f"write it as a string, or set `columns: {{{ours}: ''}}`" if ours in _OURS else "write it as a string"


def _check_same(record: Mapping[str, Any], layout: Layout, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` for a column that is not read although its text is nowhere else."""
    if not layout.same:
        return
    known = "\n".join(message["content"] for message in messages)
    read = layout.conversation or layout.question
    for name in layout.same:
        value = record[name]
        parts = [m["content"] for m in read_messages(value, name)] if _holds_messages(value) else [value]
        if all(not isinstance(text, str) or text.strip() in known for text in parts):
            continue
        ours = "messages" if layout.conversation else "instruction"
        raise DataError(
            f"`{name}` says something that `{read}` does not",
            f"say which column is read: `columns: {{{ours}: {read}}}`",
        )


def offers_tools(record: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a row lists tools that the model may call."""
    value = record.get(layout.tools) if layout.tools else None
    if isinstance(value, str):
        try:
            return bool(json.loads(value))
        except ValueError:
            return bool(value.strip())
    return bool(value)
