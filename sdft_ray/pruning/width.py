"""Choose which members of each channel space stay, from how active they are.

Suffixes: L blocks, C members of a space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import Channels, Members, check_channels
from sdft_ray.models.families import Config, family_of

Scores = Mapping[str, NDArray[np.float64]]
"""How active each member of a space is: (C,) for `hidden`, (L, C) for `mlp`, `heads`, `kv_groups`, L blocks of the
teacher."""


@dataclass(frozen=True)
class Widths:
    """Members of each space that stay; None keeps all. `heads` are query heads in the whole block."""

    hidden: int | None = None
    mlp: int | None = None
    heads: int | None = None
    kv_groups: int | None = None


def choose_channels(widths: Widths, scores: Scores, config: Config, keep_blocks: Sequence[int]) -> Channels:
    """The most active members, the first of equals, for the blocks that stay (arXiv:2407.14679, section 2.2).

    Hidden channels have one order for the whole model; MLP channels and key-value groups are ranked in their block, and
    query heads inside their group, of which each keeps equally many. A smaller width keeps a part of what a larger one
    does, but for heads where groups go too.

    Raises `PlanError` for widths that the model does not have or that could not be loaded, and for scores of another
    model or that are no numbers.
    """
    sizes = family_of(config).space_sizes(config)
    for space in ("hidden", "mlp", "heads", "kv_groups"):
        _check_width(space, getattr(widths, space), sizes[space])
    _check_scores(scores, sizes, keep_blocks)
    groups = heads = None
    if widths.kv_groups is not None:
        groups = tuple(_most_active(scores["kv_groups"][block], widths.kv_groups) for block in keep_blocks)
    if widths.heads is not None or groups is not None:
        heads = _heads(widths, scores["heads"], sizes, keep_blocks, groups)
    channels = Channels(
        hidden=None if widths.hidden is None else _most_active(scores["hidden"], widths.hidden),
        mlp=None if widths.mlp is None else tuple(_most_active(scores["mlp"][b], widths.mlp) for b in keep_blocks),
        kv_groups=groups,
        heads=heads,
    )
    check_channels(channels, config, len(keep_blocks))
    return channels


def _heads(
    widths: Widths,
    scores_LC: NDArray[np.float64],
    sizes: Mapping[str, int],
    keep_blocks: Sequence[int],
    groups: tuple[Members, ...] | None,
) -> tuple[Members, ...]:
    """The most active heads of each group that stays."""
    in_group = sizes["heads"] // sizes["kv_groups"]
    num_groups = widths.kv_groups or sizes["kv_groups"]
    wanted = widths.heads if widths.heads is not None else num_groups * in_group
    each, rest = divmod(wanted, num_groups)
    if rest or not 1 <= each <= in_group:
        raise PlanError(
            f"{wanted} heads cannot be shared evenly by {num_groups} key-value groups of at most {in_group}",
            f"keep a multiple of {num_groups}, at most {num_groups * in_group}",
        )
    kept = []
    for place, block in enumerate(keep_blocks):
        members: list[int] = []
        for group in range(sizes["kv_groups"]) if groups is None else groups[place]:
            first = group * in_group
            members += [first + head for head in _most_active(scores_LC[block, first : first + in_group], each)]
        kept.append(tuple(members))
    return tuple(kept)


def _most_active(scores_C: NDArray[np.float64], count: int) -> Members:
    return tuple(sorted(np.argsort(-scores_C, kind="stable")[:count].tolist()))


def _check_width(space: str, width: int | None, size: int) -> None:
    if width is not None and not 1 <= width <= size:
        raise PlanError(f"cannot keep {width} of {size} members of {space}", f"keep 1 to {size}")


def _check_scores(scores: Scores, sizes: Mapping[str, int], keep_blocks: Sequence[int]) -> None:
    for space in ("hidden", "mlp", "heads", "kv_groups"):
        found = scores[space]
        if found.shape[-1] != sizes[space] or (space != "hidden" and len(found) <= max(keep_blocks)):
            raise PlanError(
                f"the scores of {space} have the shape {list(found.shape)}, the model {sizes[space]} members",
                "measure this model",
            )
        if not np.isfinite(found).all():
            raise PlanError(f"the scores of {space} hold values that are no numbers", "measure in bfloat16 or float32")
