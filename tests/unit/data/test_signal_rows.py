"""Signals on disk: what is put comes back at the place of its token, for any rows of any packing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.data.signal_rows import SignalRows, SignalWriter
from sdft_ray.data.signals import Signals, TopLogprobs

PROMPTS, RESPONSES = [3, 2, 5, 1, 4, 2], [4, 6, 1, 3, 5, 2]
SILENT = {1, 4}  # documents without signals
LENGTHS = [0 if i in SILENT else length for i, length in enumerate(RESPONSES)]


def _signals(document: int, *, hidden: bool = True) -> Signals:
    """Token t of a document says 100 * document + t, in every array."""
    said_T = 100 * document + np.arange(RESPONSES[document])
    top = TopLogprobs(
        np.stack([said_T, said_T + 10_000], 1).astype(np.int32),
        np.stack([-said_T, -said_T - 0.5], 1).astype(np.float32),
        (-said_T - 0.25).astype(np.float32),
        1 << 20,
    )
    return Signals(top, np.stack([said_T] * 3, 1).astype(np.uint16) if hidden else None)


@pytest.fixture
def rows() -> PackedRows:
    sizes = zip(PROMPTS, RESPONSES, strict=True)
    return pack([Document([7] * (p + r), [False] * p + [True] * r) for p, r in sizes], 16)


@pytest.fixture
def signals(tmp_path: Path) -> SignalRows:
    writer = SignalWriter(tmp_path / "signals", LENGTHS)
    for document in (5, 0, 3, 2):
        writer.put(document, _signals(document))
    writer.close()
    return SignalRows.load(tmp_path / "signals")


@pytest.mark.parametrize("chosen", [[0], [2, 0, 1], [1, 1, 1], [0, 0, 2]])
def test_every_marked_token_finds_its_own(rows: PackedRows, signals: SignalRows, chosen: list[int]) -> None:
    """Also when a step sees a row twice."""
    expected = []
    for row in chosen:
        for token in np.flatnonzero(rows.loss_mask_NT[row]):
            document = int(rows.document_ids_NT[row, token])
            ordinal = int(rows.position_ids_NT[row, token]) - PROMPTS[document]
            expected.append(None if document in SILENT else 100 * document + ordinal)
    index_N = signals.index(rows, chosen)
    assert (index_N < 0).tolist() == [said is None for said in expected]
    assert signals.top_ids_MK is not None
    assert signals.hidden_MD is not None
    said = [int(signals.top_ids_MK[place, 0]) for place in index_N if place >= 0]
    assert said == [value for value in expected if value is not None]
    assert [int(signals.hidden_MD[place, 2]) for place in index_N if place >= 0] == said


def test_the_arrays_are_those_put_and_stay_on_disk(signals: SignalRows) -> None:
    arrays = (signals.top_ids_MK, signals.top_logprobs_MK, signals.tail_M, signals.hidden_MD)
    for array, dtype in zip(arrays, (np.int32, np.float32, np.float32, np.uint16), strict=True):
        assert array is not None
        assert array.dtype == dtype
        assert len(array) == sum(LENGTHS)
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
    third = slice(4, 5)  # document 2 comes after the four tokens of document 0
    top = _signals(2).top
    assert top is not None
    assert signals.places_E.tolist() == [0, -1, 4, 5, -1, 8]
    assert signals.top_logprobs_MK is not None
    assert signals.top_logprobs_MK[third].tolist() == top.logprobs_TK.tolist()


def test_products_that_were_not_kept_are_not_there(tmp_path: Path) -> None:
    writer = SignalWriter(tmp_path / "signals", [0, 6])
    writer.put(1, _signals(1, hidden=False))
    writer.close()
    signals = SignalRows.load(tmp_path / "signals")
    assert signals.hidden_MD is None
    assert signals.top_ids_MK is not None


def test_a_document_that_was_forgotten_is_a_mistake(tmp_path: Path) -> None:
    writer = SignalWriter(tmp_path / "signals", LENGTHS)
    writer.put(0, _signals(0))
    with pytest.raises(AssertionError, match="document 2"):
        writer.close()


def test_signals_of_another_length_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one entry per response token"):
        SignalWriter(tmp_path / "signals", [3]).put(0, _signals(0))
