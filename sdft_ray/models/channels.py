"""Width pruning as data: which members of each channel space are kept, and the resulting config and tensor
indices.

    channels = Channels(hidden=tuple(range(96)), mlp=((0, 2, 5), (1, 2, 3)))
    check_channels(channels, config, num_blocks=2)
    config_with_channels(config, channels)["intermediate_size"]     # 3

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sdft_ray.errors import PlanError
from sdft_ray.models.families import HEAD_SPACES, SIZE_FIELDS, Config, family_of

Members = tuple[int, ...]
"""0-based, strictly increasing."""


@dataclass(frozen=True)
class Channels:
    """The kept members of each space; None keeps all.

    All blocks share one residual stream, so `hidden` is one selection. `mlp`, `kv_groups` and `heads` have one
    selection per block of the new model, of equal length, because engines support one width for all blocks. `heads`
    are query heads of the source; if only `kv_groups` is given, all heads of the kept groups are kept.
    """

    hidden: Members | None = None
    mlp: tuple[Members, ...] | None = None
    kv_groups: tuple[Members, ...] | None = None
    heads: tuple[Members, ...] | None = None

    def to_plain(self) -> dict[str, Any]:
        """The pruned spaces as JSON values."""
        return {space: members for space, members in vars(self).items() if members is not None}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Channels:
        """The inverse of `to_plain`. Raises `TypeError` for anything else."""
        hidden = content.get("hidden")
        others = {space: tuple(map(_members, lists)) for space, lists in content.items() if space != "hidden"}
        return cls(hidden=None if hidden is None else _members(hidden), **others)

    def of_block(self, block: int | None, sizes: Mapping[str, int]) -> dict[str, Members]:
        """Kept members of each pruned space, in block `block` of the new model, or outside the blocks (None)."""
        selection = {} if self.hidden is None else {"hidden": self.hidden}
        if block is None:
            return selection
        for space, members in (("mlp", self.mlp), ("kv_groups", self.kv_groups), ("heads", self.heads)):
            if members is not None:
                selection[space] = members[block]
        if "kv_groups" in selection and "heads" not in selection:
            width = sizes["heads"] // sizes["kv_groups"]
            groups = selection["kv_groups"]
            selection["heads"] = tuple(group * width + head for group in groups for head in range(width))
        return selection


WHOLE = Channels()


def check_channels(channels: Channels, config: Config, num_blocks: int) -> None:
    """Raise `PlanError` unless a model of `num_blocks` blocks with these channels can be written and loaded."""
    family = family_of(config)
    sizes = family.space_sizes(config)
    if channels.hidden is not None:
        _check_members("hidden", channels.hidden, sizes["hidden"])
    for space in ("mlp", "kv_groups", "heads"):
        choices: tuple[Members, ...] | None = getattr(channels, space)
        if choices is None:
            continue
        if len(choices) != num_blocks:
            raise PlanError(f"{space} is chosen for {len(choices)} of {num_blocks} blocks", "choose for every block")
        for members in choices:
            _check_members(space, members, sizes[space])
        widths = sorted({len(members) for members in choices})
        if len(widths) > 1:
            raise PlanError(
                f"blocks would keep between {widths[0]} and {widths[-1]} members of {space}",
                "keep the same number in all blocks: config.json has only one width, "
                "and vLLM and transformers read nothing else",
            )
    for block in range(num_blocks):
        _check_heads(channels.of_block(block, sizes), sizes, block)
    check_sizes(narrowed_sizes(channels, sizes), config)


def check_sizes(narrow: Mapping[str, int], config: Config) -> None:
    """Raise `PlanError` unless stock transformers and vLLM can load a model of this family with these sizes."""
    family = family_of(config)
    if family.head_dim_from_hidden and narrow["hidden"] != narrow["heads"] * narrow["head_dim"]:
        raise PlanError(
            f"{narrow['heads']} heads of {narrow['head_dim']} channels do not give the hidden size {narrow['hidden']}",
            f"transformers derives the head size of a {family.model_type} from them; prune both alike, or neither",
        )
    if family.heads_divide_hidden and narrow["hidden"] % narrow["heads"]:
        below = narrow["hidden"] // narrow["heads"] * narrow["heads"]
        raise PlanError(
            f"the hidden size {narrow['hidden']} is not a multiple of the {narrow['heads']} heads",
            f"transformers requires that for a {family.model_type}; keep {below} or {below + narrow['heads']} channels",
        )
    if family.rope_factors_from_hidden:
        _check_rope_factors(narrow, config)


def _check_rope_factors(narrow: Mapping[str, int], config: Config) -> None:
    """Longrope has two lists with a factor for each pair of rotated channels of a head, whose size does not change."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    expected = int(narrow["hidden"] // narrow["heads"] * share) // 2
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if isinstance(factors, list) and len(factors) != expected:
            heads, head_dim = narrow["heads"], narrow["head_dim"]
            raise PlanError(
                f"the longrope of this model has {len(factors)} values in {name}, but transformers expects {expected} "
                f"for {heads} heads and a hidden size of {narrow['hidden']}, and would refuse the pruned model",
                f"prune hidden and heads alike ({heads * head_dim} channels for {heads} heads), or neither",
            )


def narrowed_sizes(channels: Channels, sizes: Mapping[str, int]) -> dict[str, int]:
    """Number of kept members of every space."""
    return {**sizes, **{space: len(members) for space, members in channels.of_block(0, sizes).items()}}


def config_with_channels(config: Config, channels: Channels) -> dict[str, Any]:
    """The config of the narrower model; equal to `config` if no space is pruned."""
    return config_with_sizes(config, narrowed_sizes(channels, family_of(config).space_sizes(config)))


def config_with_sizes(config: Config, narrow: Mapping[str, int]) -> dict[str, Any]:
    """The config of a model with `narrow[space]` members of each space.

    `head_dim` is written explicitly: without it engines divide the hidden size by the number of heads.
    """
    sizes = family_of(config).space_sizes(config)
    changed = {SIZE_FIELDS[space]: size for space, size in narrow.items() if size != sizes[space]}
    if {"hidden_size", "num_attention_heads"} & changed.keys():
        changed["head_dim"] = narrow["head_dim"]
        changed["num_key_value_heads"] = narrow["kv_groups"]
    return {**config, **changed}


def axis_index(axis: Sequence[str], sizes: Mapping[str, int], selection: Mapping[str, Members]) -> np.ndarray | None:
    """Kept indices along an axis of a tensor, int64 and increasing; None for all."""
    if not any(space in selection for space in axis):
        return None
    parts, start = [], 0
    for space in axis:
        width = sizes["head_dim"] if space in HEAD_SPACES else 1
        members = np.asarray(selection.get(space, range(sizes[space])), dtype=np.int64)
        parts.append(start + (members[:, None] * width + np.arange(width)).reshape(-1))
        start += sizes[space] * width
    return np.concatenate(parts)


def _members(values: Any) -> Members:
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise TypeError(f"{values!r} are not members of a space")
    return tuple(values)


def _check_members(space: str, members: Members, size: int) -> None:
    if not members:
        raise PlanError(f"the plan keeps no member of {space}", "keep at least one")
    if any(later <= earlier for earlier, later in pairwise(members)):
        raise PlanError(f"the kept members of {space} are not in strictly increasing order", "list each once, in order")
    if members[0] < 0 or members[-1] >= size:
        stray = members[0] if members[0] < 0 else members[-1]
        raise PlanError(f"{space} has no member {stray}", f"the model has members 0 to {size - 1}")


def _check_heads(selection: Mapping[str, Members], sizes: Mapping[str, int], block: int) -> None:
    """Each kept group has the same number of heads, and no head is kept without its group."""
    if "heads" not in selection:
        return
    width = sizes["heads"] // sizes["kv_groups"]
    heads_of = dict.fromkeys(selection.get("kv_groups", range(sizes["kv_groups"])), 0)
    for head in selection["heads"]:
        group = head // width
        if group not in heads_of:
            raise PlanError(f"block {block} keeps head {head} without its key-value group {group}", "keep both or none")
        heads_of[group] += 1
    if len(set(heads_of.values())) > 1 or 0 in heads_of.values():
        counts = ", ".join(f"{group}: {count}" for group, count in heads_of.items())
        raise PlanError(
            f"block {block} keeps unequal numbers of heads in its key-value groups ({counts})",
            "keep equally many of each group, and at least one",
        )
