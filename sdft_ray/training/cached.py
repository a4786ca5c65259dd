"""The teacher as generation kept it: what it thought of each response token, read from disk in place of asking it.

Suffixes: N response tokens of a micro-batch, K tokens kept of a distribution, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sdft_ray.data.packing import PackedRows
from sdft_ray.data.signal_rows import SignalRows
from sdft_ray.training.objective import TeacherOutputs, TopTokens


class CachedTeacher:
    """Signals of packed rows, and the teacher's output head where hidden states are among them.

    Everything but the head stays on disk. The head takes hidden states in its own dtype: from a bfloat16 teacher they
    are to the bit what it computed, from others rounded to bfloat16.
    """

    def __init__(
        self,
        rows: PackedRows,
        signals: SignalRows,
        head: torch.nn.Linear | None = None,
        softcap: float | None = None,
    ) -> None:
        self._rows = rows
        self._signals = signals
        self._head = head
        self._softcap = softcap

    def outputs(self, chosen: Sequence[int] | np.ndarray, device: torch.device | str) -> TeacherOutputs:
        """For the marked tokens of these rows, in their order. Tokens without signals are told apart."""
        index_N = self._signals.index(self._rows, chosen)
        known_N = index_N >= 0
        place_N = np.maximum(index_N, 0)  # where nothing is known anything may stand
        return TeacherOutputs(
            hidden_ND=self._hidden(place_N, device),
            head=self._head,
            softcap=self._softcap,
            top=self._top(place_N, known_N, device),
            known_N=None if known_N.all() else torch.from_numpy(known_N).to(device),
        )

    def _hidden(self, place_N: np.ndarray, device: torch.device | str) -> torch.Tensor | None:
        if self._head is None:
            return None
        assert self._signals.hidden_MD is not None, "hidden states were kept"
        bits_ND = self._signals.hidden_MD[place_N].view(np.int16)
        return torch.from_numpy(bits_ND).view(torch.bfloat16).to(device, self._head.weight.dtype)

    def _top(self, place_N: np.ndarray, known_N: np.ndarray, device: torch.device | str) -> TopTokens | None:
        signals = self._signals
        if signals.top_ids_MK is None:
            return None
        assert signals.top_logprobs_MK is not None, "ids come with log-probabilities"
        assert signals.tail_M is not None, "and with the mass of all others"
        logprobs_NK = np.where(known_N[:, None], signals.top_logprobs_MK[place_N], -np.inf)
        tail_N = np.where(known_N, signals.tail_M[place_N], -np.inf)
        return TopTokens(
            torch.from_numpy(signals.top_ids_MK[place_N].astype(np.int64)).to(device),
            torch.from_numpy(logprobs_NK).to(device),
            torch.from_numpy(tail_N).to(device),
        )
