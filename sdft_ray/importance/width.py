"""Activation-based importance of channels: hidden, MLP, query heads and key-value groups, from forward passes.

    with watched(model) as watch:
        watch.start(lengths_B)
        model(input_ids=input_ids_BT)
    scores = watch.moments.scores("hidden")                 # aggregates as in arXiv:2407.14679, section 2.2

The activation A of a channel c is

    hidden      the output of every norm over the residual stream; their scores are summed, as all share one ranking
    mlp         the input of a block's `down_proj`, so gate, up and down projection share one index set
    heads       the input of a block's `o_proj`: the length of the vector of a head's `head_dim` channels
    kv_groups   the same for all heads of one group

Suffixes: B sequences, T tokens of a sequence, L blocks, C members of a space.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.capture import backbone_and_blocks
from sdft_ray.models.families import Family, TensorTemplate, family_of

WidthSpace = Literal["hidden", "mlp", "heads", "kv_groups"]
SPACES: tuple[WidthSpace, ...] = ("hidden", "mlp", "heads", "kv_groups")
Aggregate = Literal["mean", "l2"]

_OVER_TOKENS: tuple[Aggregate, ...] = ("mean", "l2")


@dataclass(frozen=True, eq=False)
class WidthMoments:
    """Sums over sequences in float64, from which scores are computed. Parts of a calibration set are merged by `+`.

    `sums[space, over_tokens]`, shape (2, L, C) (hidden: (2, number of norms, C)): the sum over sequences of a and of
    a squared, where a is the mean of |A| over a sequence's tokens (`mean`), or the root of the mean of its square
    (`l2`).
    """

    sums: Mapping[tuple[str, str], NDArray[np.float64]]
    num_sequences: int

    def __add__(self, other: WidthMoments) -> WidthMoments:
        """Merge two disjoint parts. Raises `ModelError` if they are from models of different shape."""
        shapes = [{key: value.shape for key, value in part.sums.items()} for part in (self, other)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                "cannot merge measurements of models of different shape",
                "measure every part of the calibration set with the same teacher",
            )
        sums = {key: value + other.sums[key] for key, value in self.sums.items()}
        return WidthMoments(sums, self.num_sequences + other.num_sequences)

    def to_bytes(self) -> bytes:
        """A NumPy archive; floats round-trip exactly, so merging stored parts equals merging in memory."""
        out = io.BytesIO()
        named = {f"{space}.{over_tokens}": values for (space, over_tokens), values in self.sums.items()}
        np.savez(out, num_sequences=np.int64(self.num_sequences), **named)  # pyright: ignore[reportArgumentType]
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> WidthMoments:
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(content), allow_pickle=False) as named:
            sums = {tuple(name.split(".")): named[name] for name in named.files if name != "num_sequences"}
            return cls(sums, int(named["num_sequences"]))  # pyright: ignore[reportArgumentType]

    def scores(
        self, space: WidthSpace, over_tokens: Aggregate = "mean", over_sequences: Aggregate = "l2"
    ) -> NDArray[np.float64]:
        """Activation score of each member, at least 0: shape (L, C), or (C,) for `hidden`.

        Mean over tokens and L2 over sequences (the root of the sum of squares) is the best choice in arXiv:2407.14679.
        Raises `DataError` if nothing was measured.
        """
        if not self.num_sequences:
            raise DataError(
                "the calibration set has no rows, so nothing was measured",
                "give a calibration set with at least one row",
            )
        plain_LC, squares_LC = self.sums[space, over_tokens]
        scores_LC = np.sqrt(squares_LC) if over_sequences == "l2" else plain_LC / self.num_sequences
        return scores_LC.sum(0) if space == "hidden" else scores_LC


@dataclass
class Watch:
    """Accumulates activations from the hooks of `watched`. Call `start` before every forward pass."""

    _shapes: Mapping[str, tuple[int, int]]
    num_sequences: int = 0
    _lengths_B: Tensor | None = None
    _sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def start(self, lengths_B: Tensor) -> None:
        """Set the number of real tokens of each row of the next forward pass (padding is on the right)."""
        assert bool((lengths_B > 0).all()), "a sequence has at least one token"
        self._lengths_B = lengths_B
        self.num_sequences += len(lengths_B)

    def see(self, space: str, place: int, values_BTC: Tensor, width: int = 1) -> None:
        """Add activations of the `place`-th block or norm, (B, T, C * width); a member is `width` channels."""
        lengths_B = self._lengths_B
        assert lengths_B is not None, "`start` was called"
        size_BTC = values_BTC.unflatten(-1, (-1, width)).norm(dim=-1, dtype=torch.float32) if width > 1 else values_BTC
        tokens_T = torch.arange(size_BTC.shape[1], device=size_BTC.device)
        share_BT1 = ((tokens_T < lengths_B[:, None]) / lengths_B[:, None]).unsqueeze(-1)
        mean_BC = (size_BTC.abs().float() * share_BT1).sum(1).double()
        square_BC = (size_BTC.float().square() * share_BT1).sum(1).double()
        for over_tokens, a_BC in zip(_OVER_TOKENS, (mean_BC, square_BC.sqrt()), strict=True):
            if not bool(torch.isfinite(a_BC).all()):
                message = f"activations of {space} are not finite in place {place}"
                raise ModelError(message, "check the weights, or measure in bfloat16 or float32")
            key = (space, over_tokens)
            if key not in self._sums:
                self._sums[key] = torch.zeros(2, *self._shapes[space], dtype=torch.float64, device=a_BC.device)
            self._sums[key][0, place] += a_BC.sum(0)
            self._sums[key][1, place] += a_BC.square().sum(0)

    @property
    def moments(self) -> WidthMoments:
        empty = {(space, over): np.zeros((2, *shape)) for space, shape in self._shapes.items() for over in _OVER_TOKENS}
        return WidthMoments(empty | {key: value.cpu().numpy() for key, value in self._sums.items()}, self.num_sequences)


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Record activations of a transformers causal LM of a supported family, or its backbone, within the `with`."""
    backbone, blocks = backbone_and_blocks(model)
    config: dict[str, Any] = backbone.config.to_dict()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    family = family_of({**config, "architectures": None})
    sizes = family.space_sizes(config)
    norms = _norms(family, config)
    inside = [norm for norm in norms if norm.per_block]
    num_norms = len(inside) * len(blocks) + len(norms) - len(inside)
    shapes = {space: (num_norms if space == "hidden" else len(blocks), sizes[space]) for space in SPACES}
    watch = Watch(shapes)
    head_dim, group_dim = sizes["head_dim"], sizes["head_dim"] * sizes["heads"] // sizes["kv_groups"]
    handles = []

    def before(module: nn.Module, spaces: Mapping[str, int], place: int) -> None:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            for space, width in spaces.items():
                watch.see(space, place, arguments[0], width)

        handles.append(module.register_forward_pre_hook(hook))

    def after(module: nn.Module, place: int) -> None:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            watch.see("hidden", place, output)

        handles.append(module.register_forward_hook(hook))

    for number, block in enumerate(blocks):
        before(block.get_submodule("mlp.down_proj"), {"mlp": 1}, number)
        before(block.get_submodule("self_attn.o_proj"), {"heads": head_dim, "kv_groups": group_dim}, number)
        for offset, norm in enumerate(inside):
            after(block.get_submodule(norm.module), number * len(inside) + offset)
    after(backbone.get_submodule("norm"), num_norms - 1)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _norms(family: Family, config: Mapping[str, Any]) -> list[TensorTemplate]:
    """The norms over the residual stream, in the order of the table."""
    return [norm for norm in family.templates(config) if norm.role == "norm" and norm.axes == (("hidden",),)]
