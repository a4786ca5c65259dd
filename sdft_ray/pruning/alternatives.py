"""Alternatives to a plan: the removals that a metric ranks next after the chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from sdft_ray.pruning.plan import BlockScores, DropLosses, SetLosses
from sdft_ray.recipe.pruning import Depth


@dataclass(frozen=True)
class Removal:
    """A set of blocks to remove, 0-based and increasing, and its score by the metric: the lowest is removed."""

    blocks: tuple[int, ...]
    score: float


def removals(
    depth: Depth, scores: BlockScores, losses: DropLosses | SetLosses | None, num_blocks: int, num_removed: int
) -> list[Removal]:
    """All removals of `num_removed` blocks that the metric of the recipe compares, the chosen one first.

    `perplexity` and `best`, from `losses`: nats per token without the blocks. Where single blocks are ranked
    (`block_influence`, perplexity of `one`), the score is the sum over them, and the removals are the chosen set and
    those that differ from it in one block. For metrics without a measurement the score is the mean angular distance.
    """
    if depth.metric == "block_influence":
        return _swapped(scores.block_influence_L, num_removed)
    if depth.metric == "perplexity":
        drops = cast(DropLosses, losses)
        return _swapped(drops.one_loss_L, num_removed) if depth.drop == "one" else _runs(drops.run_loss_S, num_removed)
    if depth.metric == "best":
        sets = cast(SetLosses, losses)
        found = [Removal(tuple(s), loss) for s, loss in zip(sets.removed, sets.loss_C, strict=True) if s]
        return sorted(found, key=lambda removal: removal.score)
    is_last = depth.metric == "angular_distance" and depth.position == "last"
    matrix = scores.angular_last_LN if is_last else scores.angular_mean_LN
    distances = matrix[num_removed - 1][: num_blocks - num_removed + 1]
    return _runs([math.inf if distance is None else distance for distance in distances], num_removed)


def _runs(scores_S: Sequence[float], length: int) -> list[Removal]:
    candidates = [Removal(tuple(range(start, start + length)), score) for start, score in enumerate(scores_S)]
    return sorted(candidates, key=lambda removal: (removal.score, removal.blocks))


def _swapped(scores_L: Sequence[float], count: int) -> list[Removal]:
    order = sorted(range(len(scores_L)), key=lambda block: (scores_L[block], block))
    chosen, others = order[:count], order[count:]
    sets = [chosen, *([*(b for b in chosen if b != gone), new] for gone in chosen for new in others)]
    candidates = [Removal(tuple(sorted(blocks)), math.fsum(scores_L[block] for block in blocks)) for blocks in sets]
    return [candidates[0], *sorted(candidates[1:], key=lambda removal: (removal.score, removal.blocks))]
