"""Conversations as training documents that fit a packed row, and which ones were truncated or dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sdft_ray.data.chat import ChatFormat
from sdft_ray.data.messages import Message, Prompt, messages_of, prompt_of, split_prompt
from sdft_ray.data.packing import Document
from sdft_ray.errors import DataError
from sdft_ray.recipe.arms import LongExamples


@dataclass
class Documents:
    """One document per conversation, in order; None for a dropped one. `dropped` and `cut` are indices into it."""

    documents: list[Document | None] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


def training_documents(
    chat: ChatFormat, conversations: Iterable[tuple[Prompt, str]], row_tokens: int, long_examples: LongExamples
) -> Documents:
    """Encode pairs of prompt and response; `long_examples` is the policy for one of over `row_tokens` tokens.

    `truncate_prompt` leaves out the oldest questions and their answers, then the beginning of the last question, which
    is usually asked at its end; if the response alone is too long, the conversation is dropped. `refuse` raises
    `DataError`.
    """
    result = Documents()
    for conversation in conversations:
        add_document(result, chat, conversation, row_tokens, long_examples)
    return result


def add_document(
    result: Documents, chat: ChatFormat, conversation: tuple[Prompt, str], row_tokens: int, long_examples: LongExamples
) -> None:
    """Encode one more conversation; see `training_documents`."""
    prompt, response = conversation
    index = len(result.documents)
    document: Document | None = chat.encode(prompt, response)
    if len(document.ids) > row_tokens:
        if long_examples == "refuse":
            raise DataError(
                f"row {index} has {len(document.ids)} tokens and train.max_seq_len is {row_tokens}",
                "raise train.max_seq_len, or set train.long_examples to drop or truncate_prompt",
            )
        document = _cut(chat, prompt, response, row_tokens) if long_examples == "truncate_prompt" else None
        (result.dropped if document is None else result.cut).append(index)
    result.documents.append(document)


def fits_surely(chat: ChatFormat, row: Mapping[str, str], texts: Iterable[str], room: int) -> bool:
    """Whether the prompt of a row together with `texts` has at most `room` tokens, told by bytes alone.

    A token has at least one byte. A template may escape the arguments of tool calls (`\\u00e9` for two bytes), and may
    frame each message.
    """
    frames = 1 + row["context"].count('"role"')
    size = sum(len(text.encode()) for text in (row["instruction"], *texts)) + 3 * len(row["context"].encode())
    return size + frames * chat.frame_tokens <= room


def _cut(chat: ChatFormat, prompt: Prompt, response: str, row_tokens: int) -> Document | None:
    """The document with the longest end of the prompt that fits; None if the response alone is too long."""
    for shorter in _without_oldest(messages_of(prompt)):
        document = chat.encode(shorter, response)
        if len(document.ids) <= row_tokens:
            return document
        prompt = shorter
    instruction, context = (prompt, "") if isinstance(prompt, str) else split_prompt(prompt)
    while instruction:
        document = chat.encode(prompt_of(instruction, context), response)
        excess = len(document.ids) - row_tokens
        if excess <= 0:
            return document
        # Estimated from the tokens per character so far; at least one character: a few iterations, little excess.
        num_cut = max(1, excess * len(instruction) // len(document.ids))
        instruction = instruction[num_cut:].lstrip()
    return None


def _without_oldest(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages without the oldest question and its answer, then without the next, ...; system messages stay."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
    asked = [i for i, message in enumerate(messages) if message["role"] == "user" and i > start]
    for place in asked:
        yield [*messages[:start], *messages[place:]]
