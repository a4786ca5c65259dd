"""Chooses the members of each channel space to keep: their number from the recipe, the members by activation scores.

Suffixes: L blocks, C members of a space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import Channels, Members, check_channels, check_sizes, config_with_sizes
from sdft_ray.models.families import Config, family_of
from sdft_ray.recipe.pruning import Width

Scores = Mapping[str, NDArray[np.float64]]
"""Activation score of each member of a space: (C,) for `hidden`, (L, C) for `mlp`, `heads`, `kv_groups`, L blocks of
the
teacher."""

SPACES = ("hidden", "mlp", "kv_groups", "heads")


def resolve_sizes(width: Width | None, config: Config) -> dict[str, int]:
    """Members of every space after pruning by the `width` of a recipe; shares are rounded down.

    Raises `PlanError` for more members than the model has, for none, and for a model that could not be loaded.
    """
    sizes = family_of(config).space_sizes(config)
    if width is None:
        return sizes
    narrow, in_group = dict(sizes), sizes["heads"] // sizes["kv_groups"]
    for space in SPACES:
        if space == "heads":  # the heads of removed groups are removed
            narrow["heads"] = narrow["kv_groups"] * in_group
        amount = getattr(width, space)
        if amount is None:
            continue
        assert amount != "target", "open amounts are resolved earlier: see `pruning.target`"
        step = {"heads": narrow["kv_groups"], "kv_groups": 1}.get(space, width.multiple_of)
        count = members(amount, sizes[space], step)
        if not 1 <= count <= narrow[space] or (count % step and count != sizes[space]):
            steps = "" if step == 1 else f", in steps of {step}"
            raise PlanError(
                f"width.{space}: cannot keep {amount} of {sizes[space]} members",
                f"keep {step} to {narrow[space] // step * step}{steps}",
            )
        narrow[space] = count
    check_sizes(narrow, config)
    _check_parallel(width.tensor_parallel, narrow)
    return narrow


def members(amount: float, size: int, step: int = 1) -> int:
    """Number of members for a count (int) or a share (float) of `size`. Shares are exact (0.7 is 7/10) and floored."""
    return math.floor(Fraction(str(amount)) * size) // step * step if isinstance(amount, float) else amount


def _check_parallel(num_ranks: int, narrow: Mapping[str, int]) -> None:
    """Raise `PlanError` unless all tensor-parallel ranks get equal shares, as vLLM requires.

    There may be fewer key-value groups than ranks, which then have copies.
    """
    groups = narrow["kv_groups"]
    shared = max(groups, num_ranks) % min(groups, num_ranks) == 0
    for space, divides in {
        "heads": narrow["heads"] % num_ranks == 0,
        "kv_groups": shared,
        "mlp": narrow["mlp"] % num_ranks == 0,
    }.items():
        if not divides:
            raise PlanError(
                f"width would leave {narrow[space]} members of {space}, which is not divisible over {num_ranks} ranks",
                f"keep a multiple of {num_ranks}, or lower width.tensor_parallel",
            )


def narrowed_config(width: Width | None, config: Config) -> Config:
    """The config with the widths of a recipe. Raises like `resolve_sizes`."""
    return config_with_sizes(config, resolve_sizes(width, config))


def choose_channels(narrow: Mapping[str, int], scores: Scores, config: Config, keep_blocks: Sequence[int]) -> Channels:
    """The most active members, the first of equals, for the kept blocks (arXiv:2407.14679, section 2.2).

    `narrow` is the result of `resolve_sizes`; a space of unchanged size is not pruned. Hidden channels have one ranking
    for the whole model; MLP channels and key-value groups are ranked within their block, and query heads within their
    group, of which each keeps the same number. A smaller width keeps a subset of a larger one, except for heads when
    groups are pruned too.

    Raises `PlanError` for widths that could not be loaded, and for scores that are of another model or not finite.
    """
    sizes = family_of(config).space_sizes(config)
    _check_scores(scores, sizes, keep_blocks)
    shrinks = {space for space in SPACES if narrow[space] != sizes[space]}

    def in_blocks(space: str) -> tuple[Members, ...] | None:
        if space not in shrinks:
            return None
        return tuple(_most_active(scores[space][block], narrow[space]) for block in keep_blocks)

    groups = in_blocks("kv_groups")
    channels = Channels(
        hidden=_most_active(scores["hidden"], narrow["hidden"]) if "hidden" in shrinks else None,
        mlp=in_blocks("mlp"),
        kv_groups=groups,
        heads=_heads(narrow, scores["heads"], sizes, keep_blocks, groups) if "heads" in shrinks else None,
    )
    check_channels(channels, config, len(keep_blocks))
    return channels


def _heads(
    narrow: Mapping[str, int],
    scores_LC: NDArray[np.float64],
    sizes: Mapping[str, int],
    keep_blocks: Sequence[int],
    groups: tuple[Members, ...] | None,
) -> tuple[Members, ...]:
    """The most active heads of each kept group."""
    in_group, each = sizes["heads"] // sizes["kv_groups"], narrow["heads"] // narrow["kv_groups"]
    chosen = []
    for place, block in enumerate(keep_blocks):
        members: list[int] = []
        for group in range(sizes["kv_groups"]) if groups is None else groups[place]:
            first = group * in_group
            members += [first + head for head in _most_active(scores_LC[block, first : first + in_group], each)]
        chosen.append(tuple(members))
    return tuple(chosen)


def _most_active(scores_C: NDArray[np.float64], count: int) -> Members:
    return tuple(sorted(np.argsort(-scores_C, kind="stable")[:count].tolist()))


def _check_scores(scores: Scores, sizes: Mapping[str, int], keep_blocks: Sequence[int]) -> None:
    for space in SPACES:
        values = scores[space]
        if values.shape[-1] != sizes[space] or (space != "hidden" and len(values) <= max(keep_blocks)):
            raise PlanError(
                f"the scores of {space} have the shape {list(values.shape)}, the model {sizes[space]} members",
                "measure this model",
            )
        if not np.isfinite(values).all():
            raise PlanError(f"the scores of {space} have values that are not finite", "measure in bfloat16 or float32")
