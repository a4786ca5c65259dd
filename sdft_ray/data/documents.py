"""Conversations as training documents that fit a packed row, and what became of those that did not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sdft_ray.data.chat import ChatFormat
from sdft_ray.data.packing import Document
from sdft_ray.errors import DataError
from sdft_ray.recipe.arms import LongExamples


@dataclass
class Documents:
    """One document per conversation, in order; None where one was left out. The others are places in that order."""

    documents: list[Document | None] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


def training_documents(
    chat: ChatFormat, conversations: Iterable[tuple[str, str]], row_tokens: int, long_examples: LongExamples
) -> Documents:
    """Encode pairs of instruction and response; `long_examples` says what becomes of one with more than `row_tokens`.

    With `truncate_prompt` the beginning of the instruction goes, since the question mostly stands at its end; where the
    response alone is too long the conversation is dropped. Raises `DataError` on a long one when they are refused.
    """
    made = Documents()
    for conversation in conversations:
        add_document(made, chat, conversation, row_tokens, long_examples)
    return made


def add_document(
    made: Documents, chat: ChatFormat, conversation: tuple[str, str], row_tokens: int, long_examples: LongExamples
) -> None:
    """One more; see `training_documents`."""
    instruction, response = conversation
    index = len(made.documents)
    document: Document | None = chat.encode(instruction, response)
    if len(document.ids) > row_tokens:
        if long_examples == "refuse":
            raise DataError(
                f"row {index} has {len(document.ids)} tokens and train.max_seq_len is {row_tokens}",
                "raise train.max_seq_len, or set train.long_examples to drop or truncate_prompt",
            )
        document = _cut(chat, instruction, response, row_tokens) if long_examples == "truncate_prompt" else None
        (made.dropped if document is None else made.cut).append(index)
    made.documents.append(document)


def _cut(chat: ChatFormat, instruction: str, response: str, row_tokens: int) -> Document | None:
    """The document with as much of the end of the instruction as fits."""
    while instruction:
        document = chat.encode(instruction, response)
        excess = len(document.ids) - row_tokens
        if excess <= 0:
            return document
        # At the rate of tokens per character so far, at least one character: a few rounds, and little too much.
        num_cut = max(1, excess * len(instruction) // len(document.ids))
        instruction = instruction[num_cut:].lstrip()
    return None
