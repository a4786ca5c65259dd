"""Importance by perplexity: the language-model loss without a block, or without a run of blocks.

Minitron (arXiv:2407.14679, section 2.2, "PPL") ranks blocks by the perplexity of the model without them, which is
exp of the losses here and gives the same order. Two variants: `one` removes every single block, `run` every run of n
consecutive blocks [l, l + n).

The whole model runs once. Without blocks [l, l + n) it is identical up to boundary l (the input of block l), so only
blocks l + n..L-1, the final norm and the LM head are computed again: for all single blocks together as much as
(L - 1) / 2 passes over all blocks and L over the head. Any other set of blocks is left out alike (`set_losses`).

Suffixes: B rows, R rows of a calibration set, T tokens of a row, N predicting tokens of all rows, C sets of blocks,
D hidden channels, L blocks, S starts of a run.
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
from numpy.typing import NDArray
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError, PlanError
from sdft_ray.importance.capture import backbone_and_blocks, residual_stream
from sdft_ray.importance.depth import STREAM_BYTES, parts
from sdft_ray.models.families import family_of
from sdft_ray.models.head import OutputHead


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


Batch = Sequence[Tensor]
"""input_ids_BT, attention_mask_BT, and perhaps response_mask_BT and row_B."""


def drop_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    num_removed: int,
    losses: DropMoments | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
    max_logits: int | None = None,
) -> DropMoments:
    """Like `drop_losses_of_parts`, of a calibration set in one part: `losses` (None: zero), and what `batches` add."""
    start = DropMoments.empty(len(backbone_and_blocks(model)[1]), num_removed)
    start = start if losses is None else start + losses
    return drop_losses_of_parts(model, batches, num_removed, [start], stream_bytes, max_logits)[0]


@torch.inference_mode()
def drop_losses_of_parts(
    model: nn.Module,
    batches: Iterable[Batch],
    num_removed: int,
    losses: Sequence[DropMoments],
    stream_bytes: int = STREAM_BYTES,
    max_logits: int | None = None,
) -> list[DropMoments]:
    """Add to `losses`, one for each part of the rows, the loss of `model` on `batches` without each block, and without
    each run of `num_removed` blocks.

    Row i of the calibration set belongs to part i mod K. A batch is (input_ids_BT, attention_mask_BT), right-padded,
    mask 1 on real tokens, or these and response_mask_BT, 1 on the tokens that count (without it: all), and row_B, the
    numbers of its rows (without it: all 0); the loss is the next-token cross-entropy. Padding and the first token
    of a row are never predicted; a row of one token adds nothing. `model` is a transformers causal LM of a supported
    family with its LM head, in eval mode; batches are moved to its device. A batch whose residual stream would exceed
    `stream_bytes` is processed a few rows at a time (at least one), and at most `max_logits` logits (None:
    `models.head.MAX_LOGITS` of the device; at least those of one token) are in memory at once.

    Logits are converted to float32 (float64 stays), losses summed in float64. To distribute a calibration set over
    workers, distribute its *batches*: another grouping of rows changes the forward pass by rounding errors.

    Raises `PlanError` unless 1 <= `num_removed` < L; `DataError` for a batch that is not right-padded or has an empty
    row; `ModelError` for a model without LM head or of another family, for `losses` of other blocks, and where a loss
    is not finite.
    """
    found = list(losses)
    for whole in _whole_passes(model, batches, stream_bytes, max_logits):
        num_blocks = len(whole.calls_L)
        whole_B = _finite(whole, [()])[0]
        one_LB = _finite(whole, [(block,) for block in range(num_blocks)])
        runs = [tuple(range(start, start + num_removed)) for start in range(num_blocks - num_removed + 1)]
        run_SB = one_LB if num_removed == 1 else _finite(whole, runs)
        for part in np.unique(whole.rows_B % len(found)):
            mine_B = whole.rows_B % len(found) == part
            one_sum_L, run_sum_S = (sums_B[..., mine_B].sum(-1) for sums_B in (one_LB, run_SB))
            tokens = int(whole.tokens_B[mine_B].sum())
            seen = DropMoments(float(whole_B[mine_B].sum()), one_sum_L, run_sum_S, num_removed, tokens)
            found[part] = found[part] + seen
    return found


@dataclass(frozen=True, eq=False)
class SetLosses:
    """Losses of R rows without each of C sets of blocks, by row; parts of a calibration set are merged by `+`.

    `removed` are the sets, the empty one for the whole model. `row_R`: which rows, ascending. `nats_RC`: the summed
    loss over the `tokens_R` predicted tokens of each row, in nats and float64.
    """

    removed: tuple[tuple[int, ...], ...]
    row_R: NDArray[np.int64]
    tokens_R: NDArray[np.int64]
    nats_RC: NDArray[np.float64]

    @classmethod
    def empty(cls, removed: Sequence[Sequence[int]]) -> SetLosses:
        """The neutral element of `+`."""
        none = np.zeros(0, dtype=np.int64)
        return cls(tuple(map(tuple, removed)), none, none, np.zeros((0, len(removed))))

    @property
    def loss_C(self) -> tuple[float, ...]:
        """Mean loss without each set, nats per token. Raises `DataError` when nothing was measured."""
        if not self.tokens_R.sum():
            raise DataError("no loss was measured", "give a calibration set with a row of two tokens or more")
        return tuple((self.nats_RC.sum(0) / self.tokens_R.sum()).tolist())

    def parts(self) -> tuple[list[list[float]], list[int]]:
        """By row: the summed losses without each set but the empty one, and over how many tokens they are."""
        blocks = [number for number, removed in enumerate(self.removed) if removed]
        return self.nats_RC[:, blocks].tolist(), self.tokens_R.tolist()

    def candidates(self, chosen: Sequence[int]) -> dict[tuple[int, ...], dict[str, float | None]]:
        """Of every set: its `loss`, by how much that is `beyond` the one without `chosen`, and the `stderr` of that.

        The standard error is that of a ratio over rows, paired (Cochran, 1977, chapter 6); None with a single row.
        """
        num_rows, tokens = len(self.row_R), self.tokens_R.sum()
        differences_RC = self.nats_RC - self.nats_RC[:, [self.removed.index(tuple(chosen))]]
        beyond_C = differences_RC.sum(0) / tokens
        moves_RC = (differences_RC - beyond_C * self.tokens_R[:, None]) / tokens
        scale = num_rows / (num_rows - 1) if num_rows > 1 else math.nan
        stderr_C = np.sqrt(scale * (moves_RC**2).sum(0))
        return {
            removed: {"loss": loss, "beyond": float(beyond), "stderr": None if num_rows == 1 else float(stderr)}
            for removed, loss, beyond, stderr in zip(self.removed, self.loss_C, beyond_C, stderr_C, strict=True)
        }

    def __add__(self, other: SetLosses) -> SetLosses:
        """Merge disjoint rows. Raises `ModelError` unless both are about the same sets."""
        if self.removed != other.removed:
            raise ModelError("cannot merge losses without other blocks", "measure every part with the same blocks")
        row_R = np.concatenate([self.row_R, other.row_R])
        order = np.argsort(row_R, kind="stable")
        tokens_R = np.concatenate([self.tokens_R, other.tokens_R])
        return SetLosses(
            self.removed, row_R[order], tokens_R[order], np.concatenate([self.nats_RC, other.nats_RC])[order]
        )

    def to_json(self) -> str:
        """One JSON object; floats keep every digit."""
        arrays = {name: getattr(self, name).tolist() for name in ("row_R", "tokens_R", "nats_RC")}
        return json.dumps({"removed": self.removed, **arrays})

    @classmethod
    def from_json(cls, text: str) -> SetLosses:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        removed = tuple(map(tuple, fields["removed"]))
        rows, tokens = (np.asarray(fields[name], dtype=np.int64) for name in ("row_R", "tokens_R"))
        nats = np.asarray(fields["nats_RC"], dtype=np.float64).reshape(len(rows), len(removed))
        return cls(removed, rows, tokens, nats)


@torch.inference_mode()
def set_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    removed: Sequence[Sequence[int]],
    *,
    stream_bytes: int = STREAM_BYTES,
    max_logits: int | None = None,
) -> SetLosses:
    """The loss of every row of `batches` without each of the sets `removed` of blocks, any of them, in any place.

    The whole model runs once; a set costs the blocks that stay after its first. Everything else, errors too, is as for
    `drop_losses_of_parts`.
    """
    losses = SetLosses.empty(removed)
    for whole in _whole_passes(model, batches, stream_bytes, max_logits):
        losses = losses + SetLosses(losses.removed, whole.rows_B, whole.tokens_B, _finite(whole, losses.removed).T)
    return losses


def _whole_passes(
    model: nn.Module, batches: Iterable[Batch], stream_bytes: int, max_logits: int | None
) -> Iterator[_WholePass]:
    """A pass of the whole model for each part of a batch that memory holds."""
    assert not model.training, "dropout would be measured too: call model.eval()"
    backbone, blocks = backbone_and_blocks(model)
    config = cast(Any, backbone).config
    family_of({**config.get_text_config().to_dict(), "architectures": None})
    head, norm = OutputHead.of(model, max_logits), backbone.get_submodule("norm")
    weight = next(backbone.parameters())
    boundary_bytes = config.hidden_size * weight.dtype.itemsize
    max_tokens = stream_bytes // (boundary_bytes * (len(blocks) + 1))
    for batch in batches:
        response_BT, row = batch[2] if len(batch) > 2 else batch[1], 0
        row_B = batch[3] if len(batch) > 3 else torch.zeros(len(batch[0]), dtype=torch.int64)
        for input_ids_BT, lengths_B in parts(batch[0], batch[1], max_tokens=max_tokens):
            part_BT = response_BT[row : row + len(input_ids_BT), : input_ids_BT.shape[1]].bool()
            mine_B = row_B[row : row + len(input_ids_BT)].numpy()
            row += len(input_ids_BT)
            # Padding is on the right and attention is causal: no real token attends to it, so no mask is needed.
            moved = (tensor.to(weight.device) for tensor in (input_ids_BT, lengths_B, part_BT))
            yield _WholePass.of(backbone, blocks, head, norm, mine_B, *moved)


@dataclass(frozen=True)
class _WholePass:
    """One pass of the whole model; passes of models with fewer blocks continue from its boundaries.

    `tokens_N` are indices into the flattened rows of tokens whose next token, the target, is in the response;
    `of_row_N` says in which row of the B each stands, `rows_B` which rows of the calibration set these are, and
    `tokens_B` how many predicted tokens each has.
    """

    boundaries_LBTD: list[Tensor]
    calls_L: list[Callable[[Tensor], Tensor]]
    head: OutputHead
    norm: nn.Module
    tokens_N: Tensor
    targets_N: Tensor
    of_row_N: Tensor
    rows_B: NDArray[np.int64]
    tokens_B: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        backbone: nn.Module,
        blocks: nn.ModuleList,
        head: OutputHead,
        norm: nn.Module,
        rows_B: NDArray[np.int64],
        input_ids_BT: Tensor,
        lengths_B: Tensor,
        response_BT: Tensor,
    ) -> _WholePass:
        with _block_calls(blocks) as calls_L, residual_stream(blocks) as stream_LBTD:
            backbone(input_ids=input_ids_BT, use_cache=False)
            boundaries_LBTD = list(stream_LBTD)  # copied, because blocks that run again must not be recorded
        columns_T = torch.arange(input_ids_BT.shape[1], device=lengths_B.device)
        counts_BT = (columns_T < lengths_B[:, None] - 1) & response_BT.roll(-1, 1)
        tokens_N = counts_BT.flatten().nonzero().squeeze(1)
        targets_N, of_row_N = input_ids_BT.flatten()[tokens_N + 1], tokens_N // input_ids_BT.shape[1]
        tokens_B = counts_BT.sum(1).cpu().numpy()
        return cls(boundaries_LBTD, calls_L, head, norm, tokens_N, targets_N, of_row_N, rows_B, tokens_B)

    def loss_without(self, removed: Sequence[int]) -> Tensor:
        """Summed loss of each row, (B,) float64, of the model without the blocks `removed`."""
        num_blocks = len(self.calls_L)
        first = min(removed, default=num_blocks)
        hidden_BTD = self.boundaries_LBTD[first]
        for block in range(first, num_blocks):
            if block not in removed:
                hidden_BTD = self.calls_L[block](hidden_BTD)
        losses_N = self.head.token_losses(hidden_BTD.flatten(0, 1)[self.tokens_N], self.targets_N, self.norm)
        return losses_N.new_zeros(len(self.rows_B)).index_add_(0, self.of_row_N, losses_N)


def _finite(whole: _WholePass, removed: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The summed loss of every row without each set of blocks, (C, B), one set at a time."""
    sums_CB = torch.stack([whole.loss_without(blocks) for blocks in removed]).cpu().numpy()
    for number in np.flatnonzero(~np.isfinite(sums_CB).all(1)):
        if not removed[number]:
            raise ModelError(
                "the loss of the whole model is not finite", "check the weights, or measure in bfloat16 or float32"
            )
        raise ModelError(f"without {_named(removed[number])} the loss is not finite", "measure in bfloat16 or float32")
    return sums_CB


def _named(blocks: Sequence[int]) -> str:
    """block 3, blocks 3 to 5, or blocks 3, 5, 6."""
    if len(blocks) == 1:
        return f"block {blocks[0]}"
    is_run = blocks[-1] - blocks[0] == len(blocks) - 1
    return f"blocks {blocks[0]} to {blocks[-1]}" if is_run else f"blocks {', '.join(map(str, blocks))}"


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
