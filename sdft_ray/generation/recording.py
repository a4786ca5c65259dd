"""Records token-level signals (top-k log-probabilities, hidden states) of a transformers model during decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdft_ray.data.signals import Signals, top_logprobs
from sdft_ray.generation.sampler import SamplingParams

_Step = tuple[list[int], tuple[NDArray[Any], ...]]
"""Prompt indices of the rows of a step, and its arrays: ids and log-probabilities (B, K), hidden states (B, D)."""


class SignalRecorder:
    """Records the signals that `SamplingParams` request, step by step. Only what is stored leaves the device.

    The hidden state is the input of the output head (after the final norm), captured by a forward hook; hidden states
    of other blocks are not stored.
    """

    def __init__(self, model: Any, params: SamplingParams) -> None:
        self._params = params
        self._model = model
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._head_input_BTD: Tensor | None = None
        self._steps: list[_Step] = []

    def __enter__(self) -> SignalRecorder:
        if self._params.hidden_states:
            self._hook = self._model.get_output_embeddings().register_forward_pre_hook(self._capture)
        return self

    def __exit__(self, *_: object) -> None:
        if self._params.hidden_states:
            self._hook.remove()

    def _capture(self, module: Any, arguments: tuple[Tensor, ...]) -> None:
        del module
        self._head_input_BTD = arguments[0]

    def add(self, logits_BV: Tensor, in_batch: Sequence[int]) -> None:
        """Record one step: raw float32 logits, (B, V), and the prompt index of each row."""
        arrays: list[NDArray[Any]] = []
        if self._params.top_logprobs:
            logprobs_BV = logits_BV[:, : self._vocab_size].log_softmax(dim=-1)
            top_BK = logprobs_BV.topk(min(self._params.top_logprobs, self._vocab_size), dim=-1)
            arrays += [top_BK.indices.cpu().numpy(), top_BK.values.cpu().numpy()]
        if self._params.hidden_states:
            assert self._head_input_BTD is not None, "the head has run"
            last_BD = self._head_input_BTD[:, -1].to(torch.bfloat16)
            arrays.append(last_BD.view(torch.int16).cpu().numpy().view(np.uint16))
        if arrays:
            self._steps.append((list(in_batch), tuple(arrays)))

    def signals(self, prompt: int, num_tokens: int) -> Signals | None:
        """Signals of the first `num_tokens` steps of the prompt with this index; None if none were requested."""
        if not self._params.needs_signals:
            return None
        rows = [tuple(a[in_batch.index(prompt)] for a in arrays) for in_batch, arrays in self._steps[:num_tokens]]
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        hidden_TD = columns.pop() if self._params.hidden_states else None
        top = top_logprobs(columns[0], columns[1], self._vocab_size) if columns else None
        return Signals(top, hidden_TD)
