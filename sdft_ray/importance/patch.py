"""Linear patches: at every cut a linear map, fitted in closed form, that approximates the removed blocks at no run-time
cost, because it is merged into an existing weight.

    moments = measure(source, pruned, batches, keep_blocks)
    patches = moments.fit(ridge=0.01)
    write_with(directory, target, patched_tensors(Checkpoint.open(directory), patches))

A gap is a position after block j of the pruned model at which blocks of the source were removed. For every token let M
be the output of the MLP of block j, X = Y + M the residual stream after it, and S the residual stream of the source at
the input of the next kept block (or of the final norm). The map T = I + Delta minimises

    |M T - (S - Y)|^2 + lambda |T - I|^2  =  |M Delta - (S - X)|^2 + lambda |Delta|^2

so Delta = (M'M + lambda I)^-1 M'(S - X), and T' W_down replaces W_down. That is ReplaceMe (arXiv:2505.02819), except
that its ridge shrinks T to zero, which in the limit removes the MLP; here the limit is the model without the patch. M
and X are measured on the pruned model, in which the map is used and which may also be narrower.

Several gaps are fitted in one pass. After every gap the stream is set to S, as if its map were exact, so each map
compensates only the error since the previous gap; for pure depth pruning that is equal to ReplaceMe.

Suffixes: B sequences, T tokens of a sequence, N real tokens of a batch, D kept hidden channels, G gaps.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError, PlanError
from sdft_ray.importance.capture import backbone_and_blocks
from sdft_ray.importance.depth import STREAM_BYTES, parts
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.config import check_keep_blocks
from sdft_ray.models.families import check_patchable, family_of, join_block

_CHUNK_BYTES = 32 * 2**20
"""Size of the activations converted to float64 at once."""


@dataclass(frozen=True)
class BlockGap:
    """Blocks [`first`, `stop`) of the source are removed after block `block` of the pruned model; all 0-based."""

    block: int
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class FittedPatch:
    """The map for one block of the pruned model: (N, D) rows of MLP output times `map_DD`, float64, on the CPU.

    `residual_before` and `residual_after` are |S - X|^2 without and with it, over all tokens, as a share of |S|^2.
    After is at most before, on the tokens measured.
    """

    block: int
    map_DD: Tensor
    residual_before: float
    residual_after: float


@dataclass(frozen=True, eq=False)
class PatchMoments:
    """Sums over tokens in float64, from which the maps are computed. Parts of a calibration set are merged by `+`.

    `blocks_G` are the blocks to patch, numbered as in the pruned model. `gram_GDD` is M'M, `cross_GDD` M'(S - X),
    `residual_G` |S - X|^2 and `target_G` |S|^2.
    """

    blocks_G: NDArray[np.int64]
    gram_GDD: NDArray[np.float64]
    cross_GDD: NDArray[np.float64]
    residual_G: NDArray[np.float64]
    target_G: NDArray[np.float64]
    num_tokens: int

    def __add__(self, other: PatchMoments) -> PatchMoments:
        """Merge two disjoint parts. Raises `ModelError` if they are from different cuts."""
        if not np.array_equal(self.blocks_G, other.blocks_G) or self.gram_GDD.shape != other.gram_GDD.shape:
            raise ModelError(
                "cannot merge measurements of different cuts",
                "measure every part of the calibration set with the same two models",
            )
        return PatchMoments(
            self.blocks_G,
            self.gram_GDD + other.gram_GDD,
            self.cross_GDD + other.cross_GDD,
            self.residual_G + other.residual_G,
            self.target_G + other.target_G,
            self.num_tokens + other.num_tokens,
        )

    def to_bytes(self) -> bytes:
        """A NumPy archive of about 16 G D^2 bytes; floats round-trip exactly."""
        out = io.BytesIO()
        named: dict[str, Any] = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(out, **named)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> PatchMoments:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as named:
            sums: dict[str, Any] = {name: named[name] for name in named.files}
        return cls(**{**sums, "num_tokens": int(sums["num_tokens"])})

    def fit(self, ridge: float) -> tuple[FittedPatch, ...]:
        """The map of every gap. `ridge` > 0: lambda over the mean of the diagonal of M'M.

        If the output of the MLP is zero, the map is the identity. Raises `DataError` if nothing was measured, or if
        `ridge` is 0 at float64 precision and the tokens do not determine the map.
        """
        assert ridge > 0, "without a ridge the map may not exist"
        if not self.num_tokens:
            raise DataError(
                "the calibration set has no rows, so nothing was measured",
                "give a calibration set with at least one row",
            )
        return tuple(self._fit(place, ridge) for place in range(len(self.blocks_G)))

    def _fit(self, place: int, ridge: float) -> FittedPatch:
        gram_DD, cross_DD = (torch.from_numpy(sums[place]) for sums in (self.gram_GDD, self.cross_GDD))
        penalty = ridge * float(gram_DD.diagonal().mean()) or 1.0  # any value works if the MLP output is zero
        eye_DD = torch.eye(len(gram_DD), dtype=torch.float64)
        factor_DD, failed = torch.linalg.cholesky_ex(gram_DD + penalty * eye_DD)
        if failed:
            message = f"{self.num_tokens} tokens and a ridge of {ridge} do not determine the patch"
            raise DataError(message, "give a larger ridge, 0.01 for example, or more calibration rows")
        delta_DD = torch.cholesky_solve(cross_DD, factor_DD)
        # |M Delta - R|^2 with (M'M + lambda I) Delta = M'R inserted is |R|^2 minus this term.
        gained = float((delta_DD * cross_DD).sum() + penalty * delta_DD.square().sum())
        before, whole = float(self.residual_G[place]), float(self.target_G[place])
        block = int(self.blocks_G[place])
        return FittedPatch(block, eye_DD + delta_DD, before / whole, max(0.0, before - gained) / whole)


def patch_gaps(keep_blocks: Sequence[int], num_blocks: int) -> tuple[BlockGap, ...]:
    """The gaps after the blocks of a model with `keep_blocks` out of `num_blocks`, in order.

    Blocks removed before the first kept block are not a gap: there is no MLP before them to patch. Raises `PlanError`
    if there is no gap, or for blocks that the source does not have.
    """
    check_keep_blocks(keep_blocks, num_blocks)
    neighbours = enumerate(pairwise([*keep_blocks, num_blocks]))
    gaps = tuple(BlockGap(block, this + 1, after) for block, (this, after) in neighbours if this + 1 < after)
    if gaps:
        return gaps
    if keep_blocks[0] > 0:
        raise PlanError(
            f"only blocks before the first kept block, {keep_blocks[0]}, are removed: there is no MLP to patch",
            "remove the patch, or keep block 0",
        )
    raise PlanError("no block is removed, so there is nothing to patch", "remove the patch, or prune blocks")


@torch.inference_mode()
def measure(
    source: nn.Module,
    pruned: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep_blocks: Sequence[int],
    hidden: Sequence[int] | None = None,
    moments: PatchMoments | None = None,
    *,
    stream_bytes: int = STREAM_BYTES,
) -> PatchMoments:
    """Add the sums over `batches` at the gaps to `moments` (None: start from zero), without the LM heads.

    `pruned` is a pruned copy of `source` (`models.surgery`) and shares no module with it: it has the blocks
    `keep_blocks` and the hidden channels `hidden` (None: all). The scaling by surgery does not change the residual
    stream, so the channels of both are directly comparable. Both are transformers causal LMs or their backbones, in
    eval mode, on one device, to which batches are moved.

    A batch is (input_ids_BT, attention_mask_BT), right-padded, mask 1 on real tokens; padding is never counted. It
    is processed a few rows at a time if the stored activations would exceed `stream_bytes`. Sums need 16 G D^2 bytes on
    the device and are copied to the host at the end of the call: pass many batches to one call.

    Raises `PlanError` if there is no gap to patch, `ModelError` for a family that cannot be patched and for hidden
    states that are not finite or all zero, `DataError` for a batch that is not right-padded or has an empty row.
    """
    assert not source.training, "dropout would be measured too: call source.eval()"
    assert not pruned.training, "dropout would be measured too: call pruned.eval()"
    (whole, whole_blocks), (cut, cut_blocks) = backbone_and_blocks(source), backbone_and_blocks(pruned)
    config: dict[str, Any] = whole.config.to_dict()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    check_patchable(family_of({**config, "architectures": None}))
    gaps = patch_gaps(keep_blocks, len(whole_blocks))
    weight = next(cut.parameters())
    sums = _Sums.empty(gaps, config["hidden_size"] if hidden is None else len(hidden), weight.device)
    stays_D = slice(None) if hidden is None else torch.tensor(hidden, device=weight.device)
    max_tokens = stream_bytes // (3 * len(gaps) * config["hidden_size"] * weight.dtype.itemsize)
    with _followed(whole_blocks, cut_blocks, gaps, stays_D) as captured:
        for batch in batches:
            for input_ids_BT, lengths_B in parts(*batch, max_tokens=max_tokens):
                ids_BT = input_ids_BT.to(weight.device)
                # Padding is on the right and attention is causal: no real token attends to it.
                whole(input_ids=ids_BT, use_cache=False)
                cut(input_ids=ids_BT, use_cache=False)
                real_BT = torch.arange(ids_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
                tokens_N = real_BT.flatten().nonzero().squeeze(1).to(weight.device)
                flat = {key: output_BTD.flatten(0, 1)[tokens_N] for key, output_BTD in captured.items()}
                for place, gap in enumerate(gaps):
                    sums.add(place, flat["M", gap], flat["X", gap], flat["S", gap])
                sums.num_tokens += len(tokens_N)
                sums.check()
                captured.clear()
    return sums.moments if moments is None else moments + sums.moments


def patched_tensors(checkpoint: Checkpoint, patches: Iterable[FittedPatch]) -> dict[str, Tensor]:
    """New values of the tensors of the pruned model that the patches change, by name, in the dtypes of `checkpoint`.

    Computed in float64. Raises `ModelError` for a family that cannot be patched, and for values outside the range of
    the dtype.
    """
    check_patchable(checkpoint.family)
    tensors: dict[str, Tensor] = {}
    for patch in patches:
        names = [join_block(patch.block, f"mlp.down_proj.{part}") for part in ("weight", "bias")]
        assert names[0] in checkpoint.tensors, "the patch belongs to another model"
        for name in names:
            if name in checkpoint.tensors:
                stored = checkpoint.read(name)
                tensors[name] = (patch.map_DD.T @ stored.double()).to(stored.dtype)
                if not bool(torch.isfinite(tensors[name]).all()):
                    message = f"patched, {name} is not finite in {str(stored.dtype).removeprefix('torch.')}"
                    raise ModelError(message, "give a larger ridge, or weights in bfloat16 or float32")
    return tensors


@dataclass
class _Sums:
    """Accumulates `PatchMoments` on the device of the models."""

    blocks: tuple[int, ...]
    gram_GDD: Tensor
    cross_GDD: Tensor
    residual_G: Tensor
    target_G: Tensor
    num_tokens: int = 0

    @classmethod
    def empty(cls, gaps: Sequence[BlockGap], hidden: int, device: torch.device) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(gaps), *shape, dtype=torch.float64, device=device)

        blocks = tuple(gap.block for gap in gaps)
        return cls(blocks, zeros(hidden, hidden), zeros(hidden, hidden), zeros(), zeros())

    def add(self, place: int, mlp_ND: Tensor, stream_ND: Tensor, target_ND: Tensor) -> None:
        """Add M, X and S of one gap, each (N, D)."""
        chunk = max(1, _CHUNK_BYTES // (8 * mlp_ND.shape[1]))
        parts = (values_ND.split(chunk) for values_ND in (mlp_ND, stream_ND, target_ND))
        for mlp, stream, target in zip(*parts, strict=True):
            wide, target64 = mlp.double(), target.double()
            residual = target64 - stream.double()
            self.gram_GDD[place].addmm_(wide.T, wide)
            self.cross_GDD[place].addmm_(wide.T, residual)
            self.residual_G[place] += residual.square().sum()
            self.target_G[place] += target64.square().sum()

    def check(self) -> None:
        """Raise `ModelError` if no map can be fitted; M is part of X, so it needs no separate check."""
        finite_G = torch.isfinite(self.residual_G)
        fine_G = finite_G & (self.target_G > 0)
        if not bool(fine_G.all()):
            place = int(fine_G.logical_not().nonzero()[0])
            what = "all zero" if finite_G[place] else "not finite"
            message = f"hidden states are {what} around the cut after block {self.blocks[place]} of the pruned model"
            raise ModelError(message, "check the weights, or measure in bfloat16 or float32")

    @property
    def moments(self) -> PatchMoments:
        return PatchMoments(
            np.array(self.blocks, dtype=np.int64),
            self.gram_GDD.cpu().numpy(),
            self.cross_GDD.cpu().numpy(),
            self.residual_G.cpu().numpy(),
            self.target_G.cpu().numpy(),
            self.num_tokens,
        )


@contextmanager
def _followed(
    whole_blocks: nn.ModuleList, cut_blocks: nn.ModuleList, gaps: Sequence[BlockGap], stays_D: Any
) -> Iterator[dict[tuple[str, BlockGap], Tensor]]:
    """Capture M, X and S of every gap, (B, T, D), within the `with`; the source has to run first."""
    captured: dict[tuple[str, BlockGap], Tensor] = {}
    handles = []

    def after(module: nn.Module, name: str, gap: BlockGap) -> None:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor | None:
            captured[name, gap] = output[..., stays_D] if name == "S" else output
            return captured["S", gap] if name == "X" else None

        handles.append(module.register_forward_hook(hook))

    for gap in gaps:
        after(whole_blocks[gap.stop - 1], "S", gap)
        after(cut_blocks[gap.block].get_submodule("mlp.down_proj"), "M", gap)
        after(cut_blocks[gap.block], "X", gap)
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
