"""Packs documents into rows of equal length, so that training spends few tokens on padding.

    rows = pack([Document(ids=[1, 5, 6, 2], loss_mask=[False, False, True, True])], row_tokens=8)
    rows.save(Path("rows.arrow"))
    rows = PackedRows.load(Path("rows.arrow"))          # memory-mapped
    logits_BTV = model(**attention_inputs(rows, [0])).logits

Suffixes: N rows, T tokens of a row, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdft_ray.errors import DataError

_COLUMNS: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "loss_mask": np.uint8,
    "segment_ids": np.int16,
    "position_ids": np.int32,
    "document_ids": np.int32,
}
_MAX_DOCUMENTS_PER_ROW = np.iinfo(np.int16).max  # segment_ids are int16


@dataclass(frozen=True)
class Document:
    """Token ids of one text, and for each whether its prediction counts in the loss."""

    ids: list[int]
    loss_mask: list[bool]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_mask):
            raise DataError(f"a document has {len(self.ids)} ids but {len(self.loss_mask)} values in its loss mask")


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of T tokens: one or more whole documents each, then padding.

    `segment_ids_NT` is 0 on padding and 1..k on the documents of a row; `position_ids_NT` restarts at 0 with
    every document and with the padding; `loss_mask_NT` is True on tokens whose prediction counts;
    `document_ids_NT` is the index of the document that a token belongs to, -1 on padding.
    """

    input_ids_NT: np.ndarray
    loss_mask_NT: np.ndarray
    segment_ids_NT: np.ndarray
    position_ids_NT: np.ndarray
    document_ids_NT: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.input_ids_NT.shape[0]

    @property
    def row_tokens(self) -> int:
        return self.input_ids_NT.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, without padding."""
        return int(np.count_nonzero(self.segment_ids_NT))

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask_NT))

    def documents(self) -> Iterator[Document]:
        """Every document, row by row."""
        for ids_T, mask_T, segments_T in zip(self.input_ids_NT, self.loss_mask_NT, self.segment_ids_NT, strict=True):
            for segment in range(1, int(segments_T.max(initial=0)) + 1):
                here_T = segments_T == segment
                yield Document(ids_T[here_T].tolist(), mask_T[here_T].tolist())

    def save(self, path: Path) -> None:
        """Write one uncompressed Arrow IPC file with one fixed-size list column per array."""
        import pyarrow as pa  # late: training itself needs no Arrow

        arrays = []
        for name, kind in _COLUMNS.items():
            values_NT = getattr(self, f"{name}_NT").astype(kind, copy=False)
            flat = pa.array(np.ascontiguousarray(values_NT).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, self.row_tokens))
        batch = pa.record_batch(arrays, names=list(_COLUMNS))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    @classmethod
    def load(cls, path: Path) -> PackedRows:
        """Memory-map a file written by `save`; data is read on access. Raises `DataError`."""
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.num_record_batches != 1:
                raise DataError(f"{path} does not hold packed rows", "pack the documents again")
            batch = reader.get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read packed rows {path}: {error}", "pack the documents again") from error
        if batch.schema.names != list(_COLUMNS):
            raise DataError(f"{path} does not hold packed rows", "pack the documents again")
        arrays = {}
        for name in _COLUMNS:
            column = batch.column(name)
            flat = column.values.to_numpy(zero_copy_only=True)
            arrays[name] = flat.reshape(batch.num_rows, column.type.list_size)
        arrays["loss_mask"] = arrays["loss_mask"].view(np.bool_)  # Arrow's booleans are bits: no numpy view
        return cls(**{f"{name}_NT": values_NT for name, values_NT in arrays.items()})


def pack(documents: Sequence[Document | None], row_tokens: int) -> PackedRows:
    """Pack whole documents by best-fit decreasing: longest first, each into the fullest row in which it fits.

    Deterministic; no token is dropped. None stands for a dropped document and keeps its index. The first token of a
    document never has a loss, because nothing predicts it. Raises `DataError` if there is no document, or if one is
    empty or longer than `row_tokens`.
    """
    present = {index: document for index, document in enumerate(documents) if document is not None}
    if not present:
        raise DataError("there are no documents to pack", "give at least one document")
    lengths = {index: len(document.ids) for index, document in present.items()}
    for index, length in lengths.items():
        if length == 0:
            raise DataError(f"document {index} is empty")
        if length > row_tokens:
            raise DataError(
                f"document {index} has {length} tokens and a row {row_tokens}",
                "raise row_tokens or drop the document",
            )
    rows = _best_fit_decreasing(lengths, row_tokens)
    shape = (len(rows), row_tokens)
    packed = PackedRows(
        input_ids_NT=np.zeros(shape, np.int32),
        loss_mask_NT=np.zeros(shape, np.bool_),
        segment_ids_NT=np.zeros(shape, np.int16),
        position_ids_NT=np.zeros(shape, np.int32),
        document_ids_NT=np.full(shape, -1, np.int32),
    )
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            stop = start + lengths[index]
            packed.input_ids_NT[row, start:stop] = present[index].ids
            packed.loss_mask_NT[row, start:stop] = present[index].loss_mask
            packed.loss_mask_NT[row, start] = False
            packed.segment_ids_NT[row, start:stop] = segment
            packed.position_ids_NT[row, start:stop] = np.arange(lengths[index])
            packed.document_ids_NT[row, start:stop] = index
            start = stop
        packed.position_ids_NT[row, start:] = np.arange(row_tokens - start)
    return packed


def _best_fit_decreasing(lengths: Mapping[int, int], row_tokens: int) -> list[list[int]]:
    """Document indices of each row, from the length of each document."""
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    rooms = 0  # bit r is set while an open row has room for exactly r more tokens: best fit is one shift
    for index in sorted(lengths, key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length and len(rows[row]) < _MAX_DOCUMENTS_PER_ROW:
            rows_by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def attention_inputs(
    rows: PackedRows, indices: Sequence[int] | np.ndarray, *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Keyword arguments for a transformers model with which documents of the same row do not attend to each other.

    `input_ids` and `position_ids` are int64 (B, T). `attention_mask` is omitted on purpose: without it and without a
    KV cache, transformers detects document boundaries where positions restart and adds them to the mask of each block,
    causal or sliding-window, for every attention implementation (`masking_utils.find_packed_sequence_indices`). Padding
    counts as one more document.
    """
    chosen = np.asarray(indices)
    return {
        "input_ids": torch.from_numpy(rows.input_ids_NT[chosen].astype(np.int64)).to(device),
        "position_ids": torch.from_numpy(rows.position_ids_NT[chosen].astype(np.int64)).to(device),
        "use_cache": False,
    }
