"""Calibration rows as right-padded batches of token ids, one forward pass each."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdft_ray.data.chat import ChatFormat
from sdft_ray.data.messages import ChatSettings, row_prompt
from sdft_ray.data.packing import Document
from sdft_ray.errors import DataError


class CalibrationBatch(NamedTuple):
    """All int64, shape (B, T); the attention mask is 1 on real tokens and 0 on padding at the right (id 0).

    `response_mask_BT` is 1 on tokens that the model generates: responses with their end of turn, or all of plain text.
    `row_B`, (B,), is where each row stands in the table, from 0.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    response_mask_BT: Tensor
    row_B: Tensor


def calibration_batches(
    rows: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    batch_tokens: int,
    chat: ChatSettings | None = None,
) -> list[CalibrationBatch]:
    """Tokenize `rows` (SEED_SCHEMA) and batch them by length, shortest first, to minimise padding.

    A row is a whole conversation in the tokenizer's chat format, or plain text where its instruction is "".
    It is truncated on the right to `max_tokens`. A batch has at most `batch_tokens` positions, padding included, but
    always at least one row. The result depends only on the arguments, so each worker may build it and take every n-th
    batch.

    Raises `DataError` for no rows or a row without tokens, `ModelError` where a conversation needs a chat
    template and the tokenizer has none.
    """
    documents = row_documents(rows, tokenizer, max_tokens, chat)
    if not documents:
        raise DataError("the calibration set has no rows", "give at least one row")
    order = sorted(range(len(documents)), key=lambda row: len(documents[row].ids))  # stable
    batches: list[CalibrationBatch] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end - start + 1) * len(documents[order[end]].ids) > batch_tokens:
            batches.append(_padded([documents[row] for row in order[start:end]], order[start:end]))
            start = end
    return batches


def row_documents(
    rows: pa.Table, tokenizer: PreTrainedTokenizerBase, max_tokens: int, settings: ChatSettings | None = None
) -> list[Document]:
    """Every row, in the order of the table, truncated on the right to `max_tokens`.

    The loss mask marks the response of a conversation with its end of turn, or all of plain text. Raises like
    `calibration_batches`.
    """
    documents: list[Document] = []
    chat = ChatFormat(tokenizer, settings) if any(rows["instruction"].to_pylist()) else None
    for row in rows.select(["example_id", "instruction", "context", "reference_response"]).to_pylist():
        if chat and row["instruction"]:
            document = chat.encode(row_prompt(row), row["reference_response"])
        else:
            ids = tokenizer.encode(row["reference_response"])
            document = Document(ids, [True] * len(ids))
        if not document.ids:
            raise DataError(f"row {row['example_id']} has no tokens", "remove the row, or add text")
        documents.append(Document(document.ids[:max_tokens], document.loss_mask[:max_tokens]))
    return documents


def _padded(documents: list[Document], rows: list[int]) -> CalibrationBatch:
    width = max(len(document.ids) for document in documents)
    ids, mask, said = (torch.zeros(len(documents), width, dtype=torch.int64) for _ in range(3))
    batch = CalibrationBatch(ids, mask, said, torch.tensor(rows))
    for row, document in enumerate(documents):
        length = len(document.ids)
        batch.input_ids_BT[row, :length] = torch.tensor(document.ids)
        batch.attention_mask_BT[row, :length] = 1
        batch.response_mask_BT[row, :length] = torch.tensor(document.loss_mask).long()
    return batch
