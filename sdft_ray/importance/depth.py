"""Angular distance of every run of blocks, and block influence, from one forward pass of the backbone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.capture import backbone_and_blocks, residual_stream
from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.importance.width import Watch

__all__ = ["DepthMoments", "DepthScores", "measure", "measure_parts"]

STREAM_BYTES = 64 * 2**20
"""Activations kept alive for one forward pass: (L + 1) boundaries x tokens x hidden x bytes of the dtype."""

_UNITS_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Size of the unit vectors processed at once: about the cache of a CPU, or enough to occupy a GPU."""


def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    moments: DepthMoments | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
    watch: Watch | None = None,
) -> DepthMoments:
    """Like `measure_parts`, of a calibration set in one part; a batch is (input_ids_BT, attention_mask_BT)."""
    start = DepthMoments.empty(len(backbone_and_blocks(model)[1])) if moments is None else moments
    whole = ((ids_BT, mask_BT, torch.zeros(len(ids_BT), dtype=torch.int64)) for ids_BT, mask_BT in batches)
    return measure_parts(model, whole, [start], stream_bytes=stream_bytes, watch=watch)[0]


@torch.inference_mode()
def measure_parts(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    moments: Sequence[DepthMoments],
    *,
    stream_bytes: int = STREAM_BYTES,
    watch: Watch | None = None,
) -> list[DepthMoments]:
    """Add the sums over `batches` for `model` to `moments`, one for each part of the rows, without the LM head.

    A batch is (input_ids_BT, attention_mask_BT, row_B), right-padded, mask 1 on real tokens; padding is never counted.
    `row_B` are the numbers of its rows; row i of the calibration set belongs to part i mod K. `model` is a transformers
    causal LM, or its backbone, in eval mode; batches are moved to its device. A batch whose residual stream would
    exceed `stream_bytes` is processed a few rows at a time (at least one).

    Hidden states are widened to float32 and normalised, their cosines clamped to [-1, 1], and summed in
    float64. To distribute a calibration set over workers, distribute its *batches*: a batch gives the same sums
    anywhere, whereas another grouping of rows into batches changes the forward pass by rounding errors.
    `watch` (`importance.width.watched`) records the same forward passes.

    A token at which a hidden state is all zero has no direction: it is counted by its id, and left out of all means;
    the last token of a sequence is then the last one that is not. The embedding rows of unused tokens can be so.

    Raises `DataError` for a batch that is not right-padded or has an empty row, `ModelError` for hidden
    states that are not finite (overflow in float16, damaged weights).
    """
    assert not model.training, "dropout would be measured too: call model.eval()"
    backbone, blocks = backbone_and_blocks(model)
    weight = next(backbone.parameters())
    boundary_bytes = cast(Any, backbone.config).hidden_size * weight.dtype.itemsize
    max_tokens = stream_bytes // (boundary_bytes * (len(blocks) + 1))
    found = list(moments)
    with residual_stream(blocks) as stream:
        for *batch, row_B in batches:
            row = 0
            for input_ids_BT, lengths_B in parts(*batch, max_tokens=max_tokens):
                if watch is not None:
                    watch.start(lengths_B.to(weight.device))
                # Padding is on the right and attention is causal: no real token attends to it, so no mask is needed.
                backbone(input_ids=input_ids_BT.to(weight.device), use_cache=False)
                mine_B = row_B[row : row + len(lengths_B)] % len(found)
                row += len(lengths_B)
                for part in mine_B.unique().tolist():
                    rows = (mine_B == part).nonzero().squeeze(1)
                    ids, lengths = (tensor[rows].to(weight.device) for tensor in (input_ids_BT, lengths_B))
                    at = rows.to(weight.device)
                    own = stream if len(rows) == len(mine_B) else [x_BTD[at] for x_BTD in stream]
                    found[part] = found[part] + _summed(own, ids, lengths)
                stream.clear()
    return found


def parts(input_ids_BT: Tensor, attention_mask_BT: Tensor, *, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into parts of at most `max_tokens` (at least one row) and remove padding common to all rows."""
    mask_BT = attention_mask_BT.bool()
    lengths_B = mask_BT.sum(1)
    if not bool((lengths_B > 0).all()):
        raise DataError("a calibration row has no tokens", "remove empty rows from the calibration set")
    if bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any()):
        raise DataError("a calibration batch is padded on the left", "pad on the right: mask 1 ... 1 0 ... 0")
    num_rows = max(1, max_tokens // input_ids_BT.shape[1])
    for ids, lengths in zip(input_ids_BT.split(num_rows), lengths_B.split(num_rows), strict=True):
        yield ids[:, : int(lengths.max())], lengths


def _summed(stream_LBTD: Sequence[Tensor], input_ids_BT: Tensor, lengths_B: Tensor) -> DepthMoments:
    """The moments of one forward pass."""
    flat_LND = [boundary_BTD.flatten(0, 1) for boundary_BTD in stream_LBTD]
    used_BT = torch.arange(input_ids_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
    moments = _summed_at(flat_LND, used_BT)
    if np.isfinite(moments.angular_mean_sum).all():
        return moments
    tokens_N = used_BT.flatten().nonzero().squeeze(1)
    finite = [bool(torch.isfinite(x_ND[tokens_N]).all()) for x_ND in flat_LND]
    if not all(finite):
        what = f"not finite after {finite.index(False)} blocks"
        raise ModelError(f"hidden states are {what}", "check the weights, or measure in bfloat16 or float32")
    is_zero_N = torch.stack([(x_ND == 0).all(1) for x_ND in flat_LND]).any(0)
    is_zero_BT = is_zero_N.unflatten(0, used_BT.shape) & used_BT
    zero_tokens = Counter(input_ids_BT[is_zero_BT].tolist())
    return replace(_summed_at(flat_LND, used_BT & ~is_zero_BT), zero_tokens=zero_tokens)


def _summed_at(flat_LND: Sequence[Tensor], used_BT: Tensor) -> DepthMoments:
    """The moments over the marked tokens, and over the last of them in each row that has one."""
    num_columns = used_BT.shape[1]
    tokens_N = used_BT.flatten().nonzero().squeeze(1)
    last_B = num_columns - 1 - used_BT.flip(1).int().argmax(1)
    last_B = (torch.arange(len(used_BT), device=used_BT.device) * num_columns + last_B)[used_BT.any(1)]
    mean_sum, cosine_sum = _pair_sums(flat_LND, tokens_N)
    last_sum, _ = _pair_sums(flat_LND, last_B)
    return DepthMoments(
        last_sum.cpu().numpy(), mean_sum.cpu().numpy(), cosine_sum.cpu().numpy(), len(last_B), len(tokens_N)
    )


def _pair_sums(flat_LND: Sequence[Tensor], tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Over the given tokens: the summed angular distance of every pair of boundaries, shape (L+1, L+1), and
    the summed cosine of neighbours, shape (L,), both float64.

    One batched matrix product per chunk of tokens gives all pairs; a chunk bounds memory and stays in cache.
    """
    num_boundaries, (num_positions, hidden) = len(flat_LND), flat_LND[0].shape
    device = flat_LND[0].device
    chunk = max(1, _UNITS_BYTES.get(device.type, _UNITS_BYTES["cpu"]) // (4 * num_boundaries * hidden))
    chunk = max(1, min(chunk, len(tokens_N)))
    units_CLD = torch.empty(chunk, num_boundaries, hidden, device=device)
    cosine_CLL = torch.empty(chunk, num_boundaries, num_boundaries, device=device)
    distance_sum = torch.zeros(num_boundaries, num_boundaries, dtype=torch.float64, device=device)
    cosine_sum = torch.zeros(num_boundaries - 1, dtype=torch.float64, device=device)
    everything = len(tokens_N) == num_positions  # no padding: slices are cheaper than gathering
    for start in range(0, len(tokens_N), chunk):
        chosen_C = tokens_N[start : start + chunk]
        units, cosine = units_CLD[: len(chosen_C)], cosine_CLL[: len(chosen_C)]
        for boundary, x_ND in enumerate(flat_LND):
            units[:, boundary] = x_ND[start : start + chunk] if everything else x_ND.index_select(0, chosen_C)
        units /= torch.linalg.vector_norm(units, dim=2, keepdim=True)
        torch.bmm(units, units.mT, out=cosine).clamp_(-1.0, 1.0)
        cosine_sum += cosine.diagonal(offset=1, dim1=1, dim2=2).sum(0, dtype=torch.float64)
        distance_sum += cosine.arccos_().sum(0, dtype=torch.float64)
    return distance_sum.fill_diagonal_(0.0) / math.pi, cosine_sum
