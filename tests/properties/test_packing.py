"""Whatever is packed, no token is lost, changed or moved out of its document."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.data.packing import Document, pack

ROW_TOKENS = 24

documents = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=ROW_TOKENS),
    min_size=1,
    max_size=40,
).map(lambda texts: [Document([t for t, _ in text], [m for _, m in text]) for text in texts])


def key(document: Document) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """What must survive: the first token cannot carry loss."""
    return tuple(document.ids), (False, *document.loss_mask[1:])


@given(documents)
def test_every_document_comes_out_whole(texts: list[Document]):
    rows = pack(texts, ROW_TOKENS)
    assert sorted(map(key, rows.documents())) == sorted(map(key, texts))
    assert rows.num_tokens == sum(len(text.ids) for text in texts)
    assert rows.num_loss_tokens == sum(sum(text.loss_mask[1:]) for text in texts)


@given(documents)
def test_positions_restart_exactly_where_segments_change(texts: list[Document]):
    rows = pack(texts, ROW_TOKENS)
    for segments_T, positions_T in zip(rows.segment_ids_NT, rows.position_ids_NT, strict=True):
        starts_T = np.diff(segments_T, prepend=-1) != 0
        assert np.array_equal(positions_T == 0, starts_T)
        assert np.array_equal(np.diff(positions_T) == 1, ~starts_T[1:])


@given(documents)
def test_every_token_knows_its_document(texts: list[Document]):
    rows = pack(texts, ROW_TOKENS)
    for index, text in enumerate(texts):
        assert rows.input_ids_NT[rows.document_ids_NT == index].tolist() == text.ids
    assert np.array_equal(rows.document_ids_NT == -1, rows.segment_ids_NT == 0)


@given(documents)
def test_rows_are_few(texts: list[Document]):
    """Best-fit decreasing never opens a row while another has room: at most one row is half empty."""
    rows = pack(texts, ROW_TOKENS)
    used_N = np.count_nonzero(rows.segment_ids_NT, axis=1)
    assert (used_N * 2 <= ROW_TOKENS).sum() <= 1
