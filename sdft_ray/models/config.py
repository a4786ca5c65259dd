"""The config.json of a depth-pruned model, in which every kept block has its original behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sdft_ray.errors import ModelError, PlanError
from sdft_ray.models.families import Config, family_of, num_blocks_of

_PATTERN_FIELDS = ("sliding_window_pattern", "_sliding_window_pattern")


def layer_types(config: Config) -> list[str] | None:
    """`sliding_attention` or `full_attention` per block; None for families in which all blocks are of the same kind.

    The explicit list of the config, or the one that Hugging Face would derive. Raises `ModelError` when the
    list does not have one entry per block.
    """
    family, num_blocks = family_of(config), num_blocks_of(config)
    explicit = config.get("layer_types")
    if explicit is not None:
        if not isinstance(explicit, list) or len(explicit) != num_blocks:
            raise ModelError(
                f"config.json: layer_types does not have one entry for each of {num_blocks} blocks",
                "restore the model's config.json",
            )
        return list(explicit)
    if family.sliding == "none":
        return None
    if family.sliding == "periodic":
        period = config.get("sliding_window_pattern") or family.sliding_period
        slides = [(block + 1) % period != 0 for block in range(num_blocks)]
    else:
        windowed = family.setting(config, "use_sliding_window") and family.setting(config, "sliding_window") is not None
        first = family.setting(config, "max_window_layers")
        slides = [bool(windowed) and block >= first for block in range(num_blocks)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def check_keep_blocks(keep_blocks: Sequence[int], num_blocks: int) -> None:
    """Raise `PlanError` unless `keep_blocks` is non-empty, strictly increasing and within [0, num_blocks)."""
    if not keep_blocks:
        raise PlanError("the plan keeps no block", "keep at least one")
    if any(later <= earlier for earlier, later in pairwise(keep_blocks)):
        raise PlanError("the kept blocks are not in strictly increasing order", "list each once, in the model's order")
    if keep_blocks[0] < 0 or keep_blocks[-1] >= num_blocks:
        stray = keep_blocks[0] if keep_blocks[0] < 0 else keep_blocks[-1]
        raise PlanError(f"there is no block {stray}", f"the model has blocks 0 to {num_blocks - 1}")


def config_with_blocks(config: Config, keep_blocks: Sequence[int]) -> dict[str, Any]:
    """The config of the model that consists of `keep_blocks`; equal to `config` if all are kept.

    A window pattern that depends on the block index would change the attention of renumbered blocks, so it is written
    explicitly as `layer_types`. Qwen's `max_window_layers` (blocks from there on use a sliding window) becomes the
    number of kept blocks before it, which is equivalent for every kept block.
    """
    num_blocks = num_blocks_of(config)
    check_keep_blocks(keep_blocks, num_blocks)
    if len(keep_blocks) == num_blocks:
        return dict(config)
    family, kinds = family_of(config), layer_types(config)
    result = {name: value for name, value in config.items() if name not in _PATTERN_FIELDS}
    result["num_hidden_layers"] = len(keep_blocks)
    if kinds is not None:
        result["layer_types"] = [kinds[block] for block in keep_blocks]
    if family.sliding == "from_block":
        first = family.setting(config, "max_window_layers")
        result["max_window_layers"] = sum(block < first for block in keep_blocks)
    return result
