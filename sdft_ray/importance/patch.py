"""A patch at every cut: a linear map, in closed form, that imitates the blocks that are gone and costs nothing to run.

    moments = measure(source, pruned, batches, keep_blocks)
    patches = moments.fit(ridge=0.01)
    write_with(directory, target, patched_tensors(Checkpoint.open(directory), patches))

A gap is a place where blocks of the source are gone after block j of the pruned model. For every token let M be what
block j's MLP adds to the residual stream, X = Y + M the stream after it, and S the source's stream where the next
block that stays (or the final norm) reads it. The map T = I + Delta minimises

    |M T - (S - Y)|^2 + lambda |T - I|^2  =  |M Delta - (S - X)|^2 + lambda |Delta|^2

so Delta = (M'M + lambda I)^-1 M'(S - X), and T' W_down takes the place of W_down. That is ReplaceMe
(arXiv:2505.02819), whose ridge shrinks T to zero, which in the limit silences the MLP: here the limit is the plain cut.
M and X come from the pruned model, which may be narrower too and is where the map will work.

Several gaps are fitted in one pass. Behind every gap the stream is set to S, as if its map were perfect, so each map
answers for the damage since the gap before, and none for what an earlier map mends; in depth alone that is what
ReplaceMe does.

Suffixes: B sequences, T tokens of a sequence, N real tokens of a batch, D hidden channels that stay, G gaps.
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
"""Activations widened to float64 at once."""


@dataclass(frozen=True)
class Gap:
    """Blocks [`first`, `stop`) of the source are gone after block `block` of the pruned model; all 0-based."""

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
    """Sums over tokens in float64, from which the maps follow. Parts of a calibration set are merged by `+`.

    `blocks_G` are the blocks to patch, as the pruned model counts. `gram_GDD` is M'M, `cross_GDD` M'(S - X),
    `residual_G` |S - X|^2 and `target_G` |S|^2.
    """

    blocks_G: NDArray[np.int64]
    gram_GDD: NDArray[np.float64]
    cross_GDD: NDArray[np.float64]
    residual_G: NDArray[np.float64]
    target_G: NDArray[np.float64]
    num_tokens: int

    def __add__(self, other: PatchMoments) -> PatchMoments:
        """Merge two disjoint parts. Raises `ModelError` when they come from different cuts."""
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
        """A NumPy archive of about 16 G D^2 bytes; floats keep every digit."""
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

        Where the MLP writes nothing, the map is the identity. Raises `DataError` when nothing was measured, or when
        float64 cannot tell `ridge` from 0 and the tokens do not determine the map.
        """
        assert ridge > 0, "without a ridge the map need not exist"
        if not self.num_tokens:
            raise DataError("nothing was measured", "give a calibration set with at least one row")
        return tuple(self._fit(place, ridge) for place in range(len(self.blocks_G)))

    def _fit(self, place: int, ridge: float) -> FittedPatch:
        gram_DD, cross_DD = (torch.from_numpy(sums[place]) for sums in (self.gram_GDD, self.cross_GDD))
        penalty = ridge * float(gram_DD.diagonal().mean()) or 1.0  # any will do for an MLP that writes nothing
        eye_DD = torch.eye(len(gram_DD), dtype=torch.float64)
        factor_DD, failed = torch.linalg.cholesky_ex(gram_DD + penalty * eye_DD)
        if failed:
            told = f"{self.num_tokens} tokens and a ridge of {ridge} do not determine the patch"
            raise DataError(told, "give a larger ridge, 0.01 for example, or more calibration rows")
        delta_DD = torch.cholesky_solve(cross_DD, factor_DD)
        # |M Delta - R|^2 with (M'M + lambda I) Delta = M'R put in: nothing but what goes off |R|^2 is left.
        gained = float((delta_DD * cross_DD).sum() + penalty * delta_DD.square().sum())
        before, whole = float(self.residual_G[place]), float(self.target_G[place])
        block = int(self.blocks_G[place])
        return FittedPatch(block, eye_DD + delta_DD, before / whole, max(0.0, before - gained) / whole)


def patch_gaps(keep_blocks: Sequence[int], num_blocks: int) -> tuple[Gap, ...]:
    """The gaps that a model of `keep_blocks` out of `num_blocks` has after its own blocks, in order.

    Blocks removed before the first that stays are no gap: no MLP stands before them that could imitate them. Raises
    `PlanError` when there is no gap, or for blocks that the source does not have.
    """
    check_keep_blocks(keep_blocks, num_blocks)
    neighbours = enumerate(pairwise([*keep_blocks, num_blocks]))
    gaps = tuple(Gap(block, kept + 1, after) for block, (kept, after) in neighbours if kept + 1 < after)
    if gaps:
        return gaps
    if keep_blocks[0] > 0:
        raise PlanError(
            f"only blocks before block {keep_blocks[0]}, the first that stays, are removed: no MLP is left to patch",
            "leave out the patch, or keep block 0",
        )
    raise PlanError("no block is removed, so there is nothing to patch", "leave out the patch, or remove blocks")


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
    """Add what `batches` show at the gaps to `moments` (None: start from nothing), without the LM heads.

    `pruned` was cut out of `source` (`models.surgery`) and shares no module with it: of its blocks `keep_blocks` stay,
    of its hidden channels `hidden` (None: all). What surgery scales leaves the residual stream as it was, so channels
    of both compare as they are. Both are transformers causal LMs or their backbones, in eval mode, on one device, to
    which batches are moved.

    A batch is (input_ids_BT, attention_mask_BT), right-padded, mask 1 on real tokens; pads are never counted. It is
    run some rows at a time where the activations to keep would exceed `stream_bytes`. Sums need 16 G D^2 bytes on the
    device, and are copied off it at the end of the call: give one call many batches.

    Raises `PlanError` when no gap can be patched, `ModelError` for a family that takes no patch and for hidden states
    that are not finite or all zero, `DataError` for a batch that is not right-padded or has an empty row.
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
    with _followed(whole_blocks, cut_blocks, gaps, stays_D) as seen:
        for batch in batches:
            for input_ids_BT, lengths_B in parts(*batch, max_tokens=max_tokens):
                ids_BT = input_ids_BT.to(weight.device)
                # Pads stand on the right of causal models: no real token sees them, so no mask is needed.
                whole(input_ids=ids_BT, use_cache=False)
                cut(input_ids=ids_BT, use_cache=False)
                real_BT = torch.arange(ids_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
                tokens_N = real_BT.flatten().nonzero().squeeze(1).to(weight.device)
                flat = {key: output_BTD.flatten(0, 1)[tokens_N] for key, output_BTD in seen.items()}
                for place, gap in enumerate(gaps):
                    sums.add(place, flat["M", gap], flat["X", gap], flat["S", gap])
                sums.num_tokens += len(tokens_N)
                sums.check()
                seen.clear()
    return sums.moments if moments is None else moments + sums.moments


def patched_tensors(checkpoint: Checkpoint, patches: Iterable[FittedPatch]) -> dict[str, Tensor]:
    """New values for the pruned model's tensors that the patches change, by name, in the dtypes of `checkpoint`.

    Computed in float64. Raises `ModelError` for a family that takes no patch, and for values that the dtype cannot
    hold.
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
                    told = f"patched, {name} is not finite in {str(stored.dtype).removeprefix('torch.')}"
                    raise ModelError(told, "give a larger ridge, or weights in bfloat16 or float32")
    return tensors


@dataclass
class _Sums:
    """What becomes `PatchMoments`, on the device of the models."""

    blocks: tuple[int, ...]
    gram_GDD: Tensor
    cross_GDD: Tensor
    residual_G: Tensor
    target_G: Tensor
    num_tokens: int = 0

    @classmethod
    def empty(cls, gaps: Sequence[Gap], hidden: int, device: torch.device) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(gaps), *shape, dtype=torch.float64, device=device)

        blocks = tuple(gap.block for gap in gaps)
        return cls(blocks, zeros(hidden, hidden), zeros(hidden, hidden), zeros(), zeros())

    def add(self, place: int, mlp_ND: Tensor, stream_ND: Tensor, target_ND: Tensor) -> None:
        """Take in M, X and S of one gap."""
        chunk = max(1, _CHUNK_BYTES // (8 * mlp_ND.shape[1]))
        parts = (values_ND.split(chunk) for values_ND in (mlp_ND, stream_ND, target_ND))
        for mlp, stream, target in zip(*parts, strict=True):
            wide, wanted = mlp.double(), target.double()
            residual = wanted - stream.double()
            self.gram_GDD[place].addmm_(wide.T, wide)
            self.cross_GDD[place].addmm_(wide.T, residual)
            self.residual_G[place] += residual.square().sum()
            self.target_G[place] += wanted.square().sum()

    def check(self) -> None:
        """Raise `ModelError` where no map could follow; M is part of X, so it needs no look of its own."""
        finite_G = torch.isfinite(self.residual_G)
        fine_G = finite_G & (self.target_G > 0)
        if not bool(fine_G.all()):
            place = int(fine_G.logical_not().nonzero()[0])
            what = "all zero" if finite_G[place] else "not finite"
            told = f"hidden states are {what} around the cut after block {self.blocks[place]} of the pruned model"
            raise ModelError(told, "check the weights, or measure in bfloat16 or float32")

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
    whole_blocks: nn.ModuleList, cut_blocks: nn.ModuleList, gaps: Sequence[Gap], stays_D: Any
) -> Iterator[dict[tuple[str, Gap], Tensor]]:
    """Keep M, X and S of every gap, (B, T, D), while the block runs; the source goes first."""
    seen: dict[tuple[str, Gap], Tensor] = {}
    handles = []

    def after(module: nn.Module, name: str, gap: Gap) -> None:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor | None:
            seen[name, gap] = output[..., stays_D] if name == "S" else output
            return seen["S", gap] if name == "X" else None

        handles.append(module.register_forward_hook(hook))

    for gap in gaps:
        after(whole_blocks[gap.stop - 1], "S", gap)
        after(cut_blocks[gap.block].get_submodule("mlp.down_proj"), "M", gap)
        after(cut_blocks[gap.block], "X", gap)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
