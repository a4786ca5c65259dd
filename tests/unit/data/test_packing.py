"""Packing by hand-checked examples, its file, and the inputs it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from sdft_ray.errors import DataError
from sdft_ray.lab import sets
from sdft_ray.lab.export import QUICKSTART, TEACHER
from sdft_ray.recipe.recipe import Recipe

ARRAYS = ("input_ids_NT", "loss_mask_NT", "segment_ids_NT", "position_ids_NT", "document_ids_NT")


def document(first: int, length: int) -> Document:
    return Document(list(range(first, first + length)), [True] * length)


def by_row(rows: PackedRows) -> list[list[Document]]:
    """The documents of each row."""
    found = rows.documents()
    return [[next(found) for _ in range(segments_T.max())] for segments_T in rows.segment_ids_NT]


def test_two_documents_and_padding():
    rows = pack([document(10, 2), document(20, 3)], 7)
    assert rows.input_ids_NT.tolist() == [[20, 21, 22, 10, 11, 0, 0]]
    assert rows.segment_ids_NT.tolist() == [[1, 1, 1, 2, 2, 0, 0]]
    assert rows.position_ids_NT.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert rows.loss_mask_NT.tolist() == [[False, True, True, False, True, False, False]]
    assert rows.document_ids_NT.tolist() == [[1, 1, 1, 0, 0, -1, -1]]
    assert (rows.num_rows, rows.row_tokens, rows.num_tokens, rows.num_loss_tokens) == (1, 7, 5, 3)
    assert rows.loss_mask_NT.dtype == np.bool_
    assert [rows.input_ids_NT.dtype, rows.segment_ids_NT.dtype] == [np.int32, np.int16]


def test_best_fit_fills_the_fullest_row_that_takes_a_document():
    rows = pack([document(10 * n, n) for n in (3, 8, 2, 6, 1)], 10)
    lengths = [[len(one.ids) for one in row] for row in by_row(rows)]
    assert lengths == [[8, 2], [6, 3, 1]]


@pytest.mark.slow
def test_two_percent_of_the_laboratorys_rows_is_padding_at_most():
    row_tokens = Recipe.load(QUICKSTART).train.max_seq_len
    chat = ChatFormat(load_tokenizer(TEACHER))
    documents = [chat.encode(row["instruction"], row["reference"]) for row in sets.seed_rows("mixed")]
    rows = pack(documents, row_tokens)
    assert sum(len(one.ids) for one in documents) >= 0.98 * rows.num_rows * row_tokens


def test_packing_is_deterministic():
    documents = [document(i, 1 + i * 7 % 23) for i in range(60)]
    first, second = pack(documents, 32), pack(documents, 32)
    for name in ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_a_file_gives_back_every_array_without_reading_it_into_memory(tmp_path: Path):
    rows = pack([document(i, 1 + i * 5 % 11) for i in range(40)], 16)
    rows.save(tmp_path / "rows.arrow")
    loaded = PackedRows.load(tmp_path / "rows.arrow")
    for name in ARRAYS:
        saved, found = getattr(rows, name), getattr(loaded, name)
        assert found.dtype == saved.dtype
        assert np.array_equal(found, saved)
        assert not found.flags.owndata
        assert not found.flags.writeable


@pytest.mark.parametrize("content", [b"", b"not arrow", b"ARROW1\0\0" + b"x" * 64])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "rows.arrow").write_bytes(content)
    with pytest.raises(DataError, match="packed rows"):
        PackedRows.load(tmp_path / "rows.arrow")


def test_a_truncated_file_is_refused(tmp_path: Path):
    pack([document(1, 8)], 16).save(tmp_path / "rows.arrow")
    whole = (tmp_path / "rows.arrow").read_bytes()
    (tmp_path / "rows.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="packed rows"):
        PackedRows.load(tmp_path / "rows.arrow")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no documents to pack"),
        ([document(0, 1), Document([], [])], "document 1 is empty"),
        ([document(0, 9)], "9 tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents: list[Document], message: str):
    with pytest.raises(DataError, match=message):
        pack(documents, 8)


def test_marks_must_match_ids():
    with pytest.raises(DataError, match="2 ids but 1 values in its loss mask"):
        Document([1, 2], [True])


def test_inputs_are_rows_in_the_order_asked_for():
    rows = pack([document(100 * n, 4) for n in range(1, 5)], 5)
    inputs = attention_inputs(rows, [2, 0])
    assert inputs["input_ids"].dtype == inputs["position_ids"].dtype == torch.int64
    assert inputs["input_ids"].tolist() == rows.input_ids_NT[[2, 0]].tolist()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0]] * 2
    assert inputs["use_cache"] is False
