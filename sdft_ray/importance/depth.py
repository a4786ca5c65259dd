"""Angular distance of every run of blocks, and block influence, from one forward pass of the backbone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.capture import backbone_and_blocks, residual_stream
from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.importance.width import Watch

__all__ = ["DepthMoments", "DepthScores", "measure"]

STREAM_BYTES = 64 * 2**20
"""Activations kept alive for one forward pass: (L + 1) boundaries x tokens x hidden x bytes of the dtype."""

_UNITS_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Size of the unit vectors processed at once: about the cache of a CPU, or enough to occupy a GPU."""


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    moments: DepthMoments | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
    watch: Watch | None = None,
) -> DepthMoments:
    """Add the sums over `batches` for `model` to `moments` (None: start from zero), without the LM head.

    A batch is (input_ids_BT, attention_mask_BT), right-padded, mask 1 on real tokens; padding is never counted.
    `model` is a transformers causal LM, or its backbone, in eval mode; batches are moved to its device. A
    batch whose residual stream would exceed `stream_bytes` is processed a few rows at a time (at least one).

    Hidden states are widened to float32 and normalised, their cosines clamped to [-1, 1], and summed in
    float64. To distribute a calibration set over workers, distribute its *batches*: a batch gives the same sums
    anywhere, whereas another grouping of rows into batches changes the forward pass by rounding errors.
    `watch` (`importance.width.watched`) records the same forward passes.

    Raises `DataError` for a batch that is not right-padded or has an empty row, `ModelError` for hidden
    states that are not finite (overflow in float16, damaged weights) or all zero.
    """
    assert not model.training, "dropout would be measured too: call model.eval()"
    backbone, blocks = backbone_and_blocks(model)
    weight = next(backbone.parameters())
    boundary_bytes = cast(Any, backbone.config).hidden_size * weight.dtype.itemsize
    max_tokens = stream_bytes // (boundary_bytes * (len(blocks) + 1))
    moments = DepthMoments.empty(len(blocks)) if moments is None else moments
    with residual_stream(blocks) as stream:
        for batch in batches:
            for input_ids_BT, lengths_B in parts(*batch, max_tokens=max_tokens):
                if watch is not None:
                    watch.start(lengths_B.to(weight.device))
                # Padding is on the right and attention is causal: no real token attends to it, so no mask is needed.
                backbone(input_ids=input_ids_BT.to(weight.device), use_cache=False)
                moments = moments + _summed(stream, lengths_B.to(weight.device))
                stream.clear()
    return moments


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


def _summed(stream_LBTD: Sequence[Tensor], lengths_B: Tensor) -> DepthMoments:
    """The moments of one forward pass."""
    num_rows, num_columns = stream_LBTD[0].shape[:2]
    flat_LND = [boundary_BTD.flatten(0, 1) for boundary_BTD in stream_LBTD]
    columns_T = torch.arange(num_columns, device=lengths_B.device)
    tokens_N = (columns_T < lengths_B[:, None]).flatten().nonzero().squeeze(1)
    last_B = torch.arange(num_rows, device=lengths_B.device) * num_columns + lengths_B - 1
    mean_sum, cosine_sum = _pair_sums(flat_LND, tokens_N)
    last_sum, _ = _pair_sums(flat_LND, last_B)
    if not bool(torch.isfinite(mean_sum).all()):
        finite = [bool(torch.isfinite(x_ND[tokens_N]).all()) for x_ND in flat_LND]
        what = "all zero at a token" if all(finite) else f"not finite after {finite.index(False)} blocks"
        raise ModelError(f"hidden states are {what}", "check the weights, or measure in bfloat16 or float32")
    return DepthMoments(
        last_sum.cpu().numpy(), mean_sum.cpu().numpy(), cosine_sum.cpu().numpy(), num_rows, len(tokens_N)
    )


def _pair_sums(flat_LND: Sequence[Tensor], tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Over the given tokens: the summed angular distance of every pair of boundaries, shape (L+1, L+1), and
    the summed cosine of neighbours, shape (L,), both float64.

    One batched matrix product per chunk of tokens gives all pairs; a chunk bounds memory and stays in cache.
    """
    num_boundaries, (num_positions, hidden) = len(flat_LND), flat_LND[0].shape
    device = flat_LND[0].device
    chunk = max(1, _UNITS_BYTES.get(device.type, _UNITS_BYTES["cpu"]) // (4 * num_boundaries * hidden))
    chunk = min(chunk, len(tokens_N))
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
