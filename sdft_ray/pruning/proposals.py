"""What `metric: best` compares: the removal of each measured metric, and the best runs of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdft_ray.models.families import Config, num_blocks_of
from sdft_ray.pruning.alternatives import removals
from sdft_ray.pruning.plan import BlockScores, DropLosses
from sdft_ray.recipe.pruning import Depth

METRICS = {
    "angular distance, last token": {"metric": "angular_distance", "position": "last"},
    "angular distance, mean over tokens": {"metric": "angular_distance", "position": "mean"},
    "block influence": {"metric": "block_influence"},
    "perplexity of runs": {"metric": "perplexity", "drop": "run"},
    "perplexity of single blocks": {"metric": "perplexity", "drop": "one"},
}
"""Every way to measure that a recipe could ask for by itself, by its name for people."""
_NUM_RUNS = 3
"""Runs with the lowest losses on the sample that are compared on all rows."""


@dataclass(frozen=True)
class Proposal:
    """A set of blocks to remove, 0-based and ascending, and the names in `METRICS` of those that would."""

    blocks: tuple[int, ...]
    metrics: tuple[str, ...]


def proposals(scores: BlockScores, losses: DropLosses, config: Config, num_removed: int) -> list[Proposal]:
    """Each set once, in the order of `METRICS`; the runs that only come next in `losses` are last, without a metric."""
    num_blocks = num_blocks_of(config)

    def ranked(asked: dict[str, str]) -> list[tuple[int, ...]]:
        depth = Depth.model_validate({**asked, "remove_blocks": num_removed})
        return [removal.blocks for removal in removals(depth, scores, losses, num_blocks, num_removed)]

    found: dict[tuple[int, ...], list[str]] = {}
    for name, asked in METRICS.items():
        found.setdefault(ranked(asked)[0], []).append(name)
    for blocks in ranked(METRICS["perplexity of runs"])[:_NUM_RUNS]:
        found.setdefault(blocks, [])
    return [Proposal(blocks, tuple(names)) for blocks, names in found.items()]


def sets_to_measure(found: Sequence[Proposal]) -> list[tuple[int, ...]]:
    """The empty set, for the whole model, and those that are proposed."""
    return [(), *(proposal.blocks for proposal in found)]
