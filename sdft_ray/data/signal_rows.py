"""Signals of packed documents on disk: memory-mapped arrays with one entry per response token.

    writer = SignalWriter(folder, lengths=[3, 0, 2])        # response tokens of each document; 0: it has no signals
    writer.put(2, Signals(top=...))
    writer.close()
    signals = SignalRows.load(folder)
    index_N = signals.index(rows, chosen)                   # entries of the loss tokens of these rows
    logprobs_NK = signals.top_logprobs_MK[index_N]

Stored decoded, so that a training step unpacks nothing: 8 k + 4 bytes per token for the top k, 2 per hidden channel.

Suffixes: M tokens with signals, E documents, N loss tokens of some rows, K top tokens, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdft_ray.data.packing import PackedRows
from sdft_ray.data.signals import Signals

_PLACES = "places"  # file names, before .npy
_IDS, _LOGPROBS, _TAIL, _HIDDEN = "top_ids", "top_logprobs", "tail", "hidden"


@dataclass(frozen=True, eq=False)
class SignalRows:
    """Signals of M tokens, document by document, in the order of each response.

    `places_E` int64: index of the signals of the first response token of each document, -1 for documents without
    signals. Arrays of signals that are not stored are None; the others are as in `data.signals.TopLogprobs` and
    `Signals`.
    """

    places_E: NDArray[np.int64]
    top_ids_MK: NDArray[np.int32] | None
    top_logprobs_MK: NDArray[np.float32] | None
    tail_M: NDArray[np.float32] | None
    hidden_MD: NDArray[np.uint16] | None

    @classmethod
    def load(cls, folder: Path) -> SignalRows:
        """Memory-map the files of a `SignalWriter`; data is read on access."""

        def mapped(name: str) -> NDArray | None:
            path = folder / f"{name}.npy"
            return np.load(path, mmap_mode="r") if path.exists() else None

        places_E = np.load(folder / f"{_PLACES}.npy")
        return cls(places_E, mapped(_IDS), mapped(_LOGPROBS), mapped(_TAIL), mapped(_HIDDEN))

    def index(self, rows: PackedRows, chosen: Sequence[int] | np.ndarray) -> NDArray[np.int64]:
        """For every loss token of the chosen rows, row by row: its index among the M, -1 if it has no signals.

        `rows` contain the documents in the order of `lengths`, each with as many loss tokens.
        """
        chosen = np.asarray(chosen)
        row_N, token_N = rows.loss_mask_NT[chosen].nonzero()
        document_N = rows.document_ids_NT[chosen][row_N, token_N].astype(np.int64)
        # A step may contain a row twice, so a document also ends where its row ends.
        starts = np.diff(document_N, prepend=-1).astype(bool) | np.diff(row_N, prepend=-1).astype(bool)
        first_N = np.maximum.accumulate(np.where(starts, np.arange(len(document_N)), 0))
        place_N = self.places_E[document_N]
        return np.where(place_N < 0, -1, place_N + np.arange(len(document_N)) - first_N)


class SignalWriter:
    """Writes signals of documents, in any order, with one response in memory at a time.

    `lengths`: response tokens of each document to be packed, 0 for documents without signals.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        """Create `folder`, which must not exist."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._lengths = np.asarray(lengths, dtype=np.int64)
        ends_E = self._lengths.cumsum()
        self._num_tokens = int(ends_E[-1])
        self._places_E = np.where(self._lengths > 0, ends_E - self._lengths, -1)
        self._missing = set(np.flatnonzero(self._lengths).tolist())
        self._arrays: dict[str, np.memmap] = {}

    def put(self, document: int, signals: Signals) -> None:
        """Write the signals of the response of one document; all documents have the same kinds of signals."""
        self._missing.remove(document)
        place, length = int(self._places_E[document]), int(self._lengths[document])
        values = {} if signals.hidden_TD is None else {_HIDDEN: signals.hidden_TD}
        if signals.top is not None:
            top = signals.top
            values |= {_IDS: top.ids_TK, _LOGPROBS: top.logprobs_TK, _TAIL: top.tail_T}
        for name, value in values.items():
            assert len(value) == length, "signals have one entry per response token"
            if name not in self._arrays:
                shape = (self._num_tokens, *value.shape[1:])
                path = self._folder / f"{name}.npy"
                self._arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=value.dtype, shape=shape)
            self._arrays[name][place : place + length] = value

    def close(self) -> None:
        """Flush to disk, after the signals of every document were written."""
        assert not self._missing, f"document {min(self._missing)} got no signals"
        for array in self._arrays.values():
            array.flush()
        np.save(self._folder / f"{_PLACES}.npy", self._places_E)
