"""Choose which members of each channel space stay: how many from the recipe, which from how active they are.

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
"""How active each member of a space is: (C,) for `hidden`, (L, C) for `mlp`, `heads`, `kv_groups`, L blocks of the
teacher."""

SPACES = ("hidden", "mlp", "kv_groups", "heads")


def resolve_sizes(width: Width | None, config: Config) -> dict[str, int]:
    """Members of every space that a recipe's `width` leaves of a model with this config; shares are rounded down.

    Raises `PlanError` for what the model does not have, for nothing, and for what could not be loaded.
    """
    sizes = family_of(config).space_sizes(config)
    if width is None:
        return sizes
    narrow, in_group = dict(sizes), sizes["heads"] // sizes["kv_groups"]
    for space in SPACES:
        if space == "heads":  # those of groups that go, go
            narrow["heads"] = narrow["kv_groups"] * in_group
        asked = getattr(width, space)
        if asked is None:
            continue
        assert asked != "target", "open amounts are resolved before: see `pruning.target`"
        step = {"heads": narrow["kv_groups"], "kv_groups": 1}.get(space, width.multiple_of)
        wanted = members(asked, sizes[space], step)
        if not 1 <= wanted <= narrow[space] or (wanted % step and wanted != sizes[space]):
            steps = "" if step == 1 else f", in steps of {step}"
            raise PlanError(
                f"width.{space}: cannot keep {asked} of {sizes[space]} members",
                f"keep {step} to {narrow[space] // step * step}{steps}",
            )
        narrow[space] = wanted
    check_sizes(narrow, config)
    _check_parallel(width.tensor_parallel, narrow)
    return narrow


def members(asked: float, size: int, step: int = 1) -> int:
    """How many of `size` a count (int) or a share (float) asks for. Shares are exact, 0.7 is 7/10, and rounded down."""
    return math.floor(Fraction(str(asked)) * size) // step * step if isinstance(asked, float) else asked


def _check_parallel(num_ranks: int, narrow: Mapping[str, int]) -> None:
    """Raise `PlanError` unless every rank of tensor parallelism gets equally much, as vLLM wants it.

    Key-value groups may also be fewer than ranks, which then hold copies.
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
                f"width would leave {narrow[space]} members of {space}, which {num_ranks} ranks cannot share evenly",
                f"keep a multiple of {num_ranks}, or lower width.tensor_parallel",
            )


def narrowed_config(width: Width | None, config: Config) -> Config:
    """The config with the widths that a recipe asks for. Raises as `resolve_sizes`."""
    return config_with_sizes(config, resolve_sizes(width, config))


def choose_channels(narrow: Mapping[str, int], scores: Scores, config: Config, keep_blocks: Sequence[int]) -> Channels:
    """The most active members, the first of equals, for the blocks that stay (arXiv:2407.14679, section 2.2).

    `narrow` is as `resolve_sizes` gives it; a space that keeps its size is left alone. Hidden channels have one order
    for the whole model; MLP channels and key-value groups are ranked in their block, and query heads inside their
    group, of which each keeps equally many. A smaller width keeps a part of what a larger one does, but for heads where
    groups go too.

    Raises `PlanError` for widths that could not be loaded, and for scores of another model or that are no numbers.
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
    """The most active heads of each group that stays."""
    in_group, each = sizes["heads"] // sizes["kv_groups"], narrow["heads"] // narrow["kv_groups"]
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


def _check_scores(scores: Scores, sizes: Mapping[str, int], keep_blocks: Sequence[int]) -> None:
    for space in SPACES:
        found = scores[space]
        if found.shape[-1] != sizes[space] or (space != "hidden" and len(found) <= max(keep_blocks)):
            raise PlanError(
                f"the scores of {space} have the shape {list(found.shape)}, the model {sizes[space]} members",
                "measure this model",
            )
        if not np.isfinite(found).all():
            raise PlanError(f"the scores of {space} hold values that are no numbers", "measure in bfloat16 or float32")
