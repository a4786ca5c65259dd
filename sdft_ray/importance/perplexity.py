"""Importance by perplexity: the language-model loss without a block, or without a run of blocks.

Minitron (arXiv:2407.14679, section 2.2, "PPL") ranks blocks by the perplexity of the model without them, which is
exp of the losses here and gives the same order. Two variants: `one` removes every single block, `run` every run of n
consecutive blocks [l, l + n).

The whole model runs once. Without blocks [l, l + n) it is identical up to boundary l (the input of block l), so only
blocks l + n..L-1, the final norm and the LM head are computed again: for all single blocks together as much as
(L - 1) / 2 passes over all blocks and L over the head.

Suffixes: B rows, T tokens of a row, N predicting tokens of all rows, C tokens of a chunk, D hidden channels,
V vocabulary, L blocks, S starts of a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError, PlanError
from sdft_ray.importance.capture import backbone_and_blocks, residual_stream
from sdft_ray.importance.depth import STREAM_BYTES, parts
from sdft_ray.models.families import family_of

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits in memory at once, by device: 32 MiB and 256 MiB in float32, and three times that during the loss."""


@dataclass(frozen=True, eq=False)
class DropMoments:
    """Sums of losses over predicted tokens, in nats and float64. Parts of a calibration set are merged by `+`.

    `whole_sum`: nothing removed. `one_sum_L[l]`: without block l. `run_sum_S[l]`, shape (L - n + 1,): without the n =
    `num_removed` blocks [l, l + n); equal to `one_sum_L` for n = 1. Every sum is over the same `num_tokens` tokens: all
    but the first of each row, those outside the response mask, and padding.
    """

    whole_sum: float
    one_sum_L: NDArray[np.float64]
    run_sum_S: NDArray[np.float64]
    num_removed: int
    num_tokens: int

    @classmethod
    def empty(cls, num_blocks: int, num_removed: int) -> DropMoments:
        """The neutral element of `+`. Raises `PlanError` unless 1 <= `num_removed` < `num_blocks`."""
        if not 1 <= num_removed < num_blocks:
            raise PlanError(
                f"cannot measure {num_blocks} blocks without {num_removed} of them",
                f"remove 1 to {num_blocks - 1} blocks" if num_blocks > 1 else "give a model of two blocks or more",
            )
        return cls(0.0, np.zeros(num_blocks), np.zeros(num_blocks - num_removed + 1), num_removed, 0)

    @property
    def num_blocks(self) -> int:
        return len(self.one_sum_L)

    @property
    def one_loss_L(self) -> tuple[float, ...]:
        """Mean loss without each block, nats per token. Raises `DataError` when nothing was measured."""
        return self._means(self.one_sum_L)

    @property
    def run_loss_S(self) -> tuple[float, ...]:
        """Mean loss without each run of `num_removed` blocks, by its first block, nats per token.

        Raises `DataError` when nothing was measured.
        """
        return self._means(self.run_sum_S)

    def _means(self, sums: NDArray[np.float64]) -> tuple[float, ...]:
        if not self.num_tokens:
            raise DataError("no loss was measured", "give a calibration set with a row of two tokens or more")
        return tuple((sums / self.num_tokens).tolist())

    def __add__(self, other: DropMoments) -> DropMoments:
        """Merge two disjoint parts. Raises `ModelError` unless both have the same numbers of blocks and of removed
        blocks.
        """
        if (self.num_blocks, self.num_removed) != (other.num_blocks, other.num_removed):
            descriptions = (f"{part.num_removed} of {part.num_blocks} blocks" for part in (self, other))
            raise ModelError(
                f"cannot merge losses without {' and without '.join(descriptions)}",
                "measure every part of the calibration set with the same teacher and as many removed blocks",
            )
        return DropMoments(
            self.whole_sum + other.whole_sum,
            self.one_sum_L + other.one_sum_L,
            self.run_sum_S + other.run_sum_S,
            self.num_removed,
            self.num_tokens + other.num_tokens,
        )

    def to_json(self) -> str:
        """One JSON object; floats keep every digit, so a merge of stored parts equals one in memory."""
        return json.dumps(
            {
                "whole_sum": self.whole_sum,
                "one_sum_L": self.one_sum_L.tolist(),
                "run_sum_S": self.run_sum_S.tolist(),
                "num_removed": self.num_removed,
                "num_tokens": self.num_tokens,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> DropMoments:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        sums = {name: np.asarray(fields.pop(name), dtype=np.float64) for name in ("one_sum_L", "run_sum_S")}
        return cls(**sums, **fields)


@torch.inference_mode()
def drop_losses(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    num_removed: int,
    losses: DropMoments | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
    max_logits: int | None = None,
) -> DropMoments:
    """Add to `losses` (None: start from zero) the loss of `model` on `batches` without each block, and without each
    run of `num_removed` blocks.

    A batch is (input_ids_BT, attention_mask_BT), right-padded, mask 1 on real tokens, or these and response_mask_BT, 1
    on the tokens that count (without it: all); the loss is the next-token cross-entropy. Padding and the first token
    of a row are never predicted; a row of one token adds nothing. `model` is a transformers causal LM of a supported
    family with its LM head, in eval mode; batches are moved to its device. A batch whose residual stream would exceed
    `stream_bytes` is processed a few rows at a time (at least one), and at most `max_logits` logits (None:
    `MAX_LOGITS` of the device; at least those of one token) are in memory at once.

    Logits are converted to float32 (float64 stays), losses summed in float64. To distribute a calibration set over
    workers, distribute its *batches*: another grouping of rows changes the forward pass by rounding errors.

    Raises `PlanError` unless 1 <= `num_removed` < L; `DataError` for a batch that is not right-padded or has an empty
    row; `ModelError` for a model without LM head or of another family, for `losses` of other blocks, and where a loss
    is not finite.
    """
    assert not model.training, "dropout would be measured too: call model.eval()"
    backbone, blocks = backbone_and_blocks(model)
    empty = DropMoments.empty(len(blocks), num_removed)
    losses = empty if losses is None else empty + losses
    head = _Head.of(model, backbone, max_logits)
    weight = next(backbone.parameters())
    boundary_bytes = cast(Any, backbone.config).hidden_size * weight.dtype.itemsize
    max_tokens = stream_bytes // (boundary_bytes * (len(blocks) + 1))
    for batch in batches:
        response_BT, row = batch[2] if len(batch) > 2 else batch[1], 0
        for input_ids_BT, lengths_B in parts(batch[0], batch[1], max_tokens=max_tokens):
            part_BT = response_BT[row : row + len(input_ids_BT), : input_ids_BT.shape[1]].bool()
            row += len(input_ids_BT)
            # Padding is on the right and attention is causal: no real token attends to it, so no mask is needed.
            moved = (tensor.to(weight.device) for tensor in (input_ids_BT, lengths_B, part_BT))
            whole = _WholePass.of(backbone, blocks, head, *moved)
            losses = losses + _summed(whole, num_removed)
    return losses


@dataclass(frozen=True)
class _Head:
    """From the residual stream after the last block to losses: final norm, LM head, cap of the logits."""

    norm: nn.Module
    linear: nn.Module
    softcap: float | None
    chunk_tokens: int

    @classmethod
    def of(cls, model: nn.Module, backbone: nn.Module, max_logits: int | None) -> _Head:
        """Raises `ModelError` for a backbone without head, or for an unsupported family."""
        config = cast(Any, backbone).config.get_text_config()
        family_of({**config.to_dict(), "architectures": None})
        linear = None if model is backbone else cast(Any, model).get_output_embeddings()
        if linear is None:
            raise ModelError(f"{type(model).__name__} has no LM head", "load the causal language model, not its base")
        weight_VD = linear.weight
        max_logits = max_logits or MAX_LOGITS.get(weight_VD.device.type, MAX_LOGITS["cpu"])
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(backbone.get_submodule("norm"), linear, softcap, max(1, max_logits // len(weight_VD)))

    def loss_sum(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Summed cross-entropy in nats, a float64 scalar on the device; in chunks of tokens."""
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        chunks = zip(hidden_ND.split(self.chunk_tokens), targets_N.split(self.chunk_tokens), strict=True)
        for hidden_CD, targets_C in chunks:
            logits_CV = self.linear(self.norm(hidden_CD))
            logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
            if self.softcap is not None:
                logits_CV = torch.tanh(logits_CV / self.softcap) * self.softcap
            total += F.cross_entropy(logits_CV, targets_C, reduction="none").sum(dtype=torch.float64)
        return total


@dataclass(frozen=True)
class _WholePass:
    """One pass of the whole model; passes of models with fewer blocks continue from its boundaries."""

    boundaries_LBTD: list[Tensor]
    calls_L: list[Callable[[Tensor], Tensor]]
    head: _Head
    tokens_N: Tensor
    targets_N: Tensor

    @classmethod
    def of(
        cls,
        backbone: nn.Module,
        blocks: nn.ModuleList,
        head: _Head,
        input_ids_BT: Tensor,
        lengths_B: Tensor,
        response_BT: Tensor,
    ) -> _WholePass:
        """`tokens_N` are indices into the flattened rows of tokens whose next token, the target, is in the response."""
        with _block_calls(blocks) as calls_L, residual_stream(blocks) as stream_LBTD:
            backbone(input_ids=input_ids_BT, use_cache=False)
            boundaries_LBTD = list(stream_LBTD)  # copied, because blocks that run again must not be recorded
        columns_T = torch.arange(input_ids_BT.shape[1], device=lengths_B.device)
        counts_BT = (columns_T < lengths_B[:, None] - 1) & response_BT.roll(-1, 1)
        tokens_N = counts_BT.flatten().nonzero().squeeze(1)
        return cls(boundaries_LBTD, calls_L, head, tokens_N, input_ids_BT.flatten()[tokens_N + 1])

    def loss_without(self, start: int, stop: int) -> Tensor:
        """Summed loss of the model without blocks [start, stop), a float64 scalar."""
        hidden_BTD = self.boundaries_LBTD[start]
        for call in self.calls_L[stop:]:
            hidden_BTD = call(hidden_BTD)
        return self.head.loss_sum(hidden_BTD.flatten(0, 1)[self.tokens_N], self.targets_N)


def _summed(whole: _WholePass, num_removed: int) -> DropMoments:
    """The losses of one pass."""
    num_blocks = len(whole.calls_L)
    whole_sum = float(whole.loss_without(num_blocks, num_blocks))
    if not math.isfinite(whole_sum):
        raise ModelError(
            "the loss of the whole model is not finite", "check the weights, or measure in bfloat16 or float32"
        )
    one_sum_L = _sums(whole, 1)
    run_sum_S = one_sum_L if num_removed == 1 else _sums(whole, num_removed)
    return DropMoments(whole_sum, one_sum_L, run_sum_S, num_removed, len(whole.tokens_N))


def _sums(whole: _WholePass, num_removed: int) -> NDArray[np.float64]:
    """The summed loss without each run of `num_removed` blocks, one candidate at a time."""
    starts = range(len(whole.calls_L) - num_removed + 1)
    sums_S = torch.stack([whole.loss_without(start, start + num_removed) for start in starts]).cpu().numpy()
    for start in np.flatnonzero(~np.isfinite(sums_S)):
        which = f"block {start}" if num_removed == 1 else f"blocks {start} to {start + num_removed - 1}"
        raise ModelError(f"without {which} the loss is not finite", "measure in bfloat16 or float32")
    return sums_S


@contextmanager
def _block_calls(blocks: nn.ModuleList) -> Iterator[list[Callable[[Tensor], Tensor]]]:
    """Record each block of a forward pass as a function of its input alone.

    All other arguments (its attention mask, rotary embeddings, position ids) are kept, so the block can be applied to
    another residual stream of the same shape. The functions remain valid after the `with`.
    """
    calls_L: list[Callable[[Tensor], Tensor]] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls_L.append(partial(_call, block, args[1:], others))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    try:
        yield calls_L
    finally:
        for handle in handles:
            handle.remove()


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: Tensor) -> Tensor:
    output = block(hidden_BTD, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
