"""Conversations as training documents that fit a packed row, and which ones were truncated or dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sdft_ray.data.chat import ChatFormat
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
    chat: ChatFormat, conversations: Iterable[tuple[str, str]], row_tokens: int, long_examples: LongExamples
) -> Documents:
    """Encode pairs of instruction and response; `long_examples` is the policy for one of over `row_tokens` tokens.

    `truncate_prompt` truncates the instruction on the left, because the question is usually at its end; if the response
    alone is too long, the conversation is dropped. `refuse` raises `DataError`.
    """
    result = Documents()
    for conversation in conversations:
        add_document(result, chat, conversation, row_tokens, long_examples)
    return result


def add_document(
    result: Documents, chat: ChatFormat, conversation: tuple[str, str], row_tokens: int, long_examples: LongExamples
) -> None:
    """Encode one more conversation; see `training_documents`."""
    instruction, response = conversation
    index = len(result.documents)
    document: Document | None = chat.encode(instruction, response)
    if len(document.ids) > row_tokens:
        if long_examples == "refuse":
            raise DataError(
                f"row {index} has {len(document.ids)} tokens and train.max_seq_len is {row_tokens}",
                "raise train.max_seq_len, or set train.long_examples to drop or truncate_prompt",
            )
        document = _cut(chat, instruction, response, row_tokens) if long_examples == "truncate_prompt" else None
        (result.dropped if document is None else result.cut).append(index)
    result.documents.append(document)


def _cut(chat: ChatFormat, instruction: str, response: str, row_tokens: int) -> Document | None:
    """The document with the longest end of the instruction that fits; None if the response alone is too long."""
    while instruction:
        document = chat.encode(instruction, response)
        excess = len(document.ids) - row_tokens
        if excess <= 0:
            return document
        # Estimated from the tokens per character so far; at least one character: a few iterations, little excess.
        num_cut = max(1, excess * len(instruction) // len(document.ids))
        instruction = instruction[num_cut:].lstrip()
    return None
