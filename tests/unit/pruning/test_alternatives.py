"""Other removals: the metric's own choice comes first, and what follows is in its order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.pruning.alternatives import Removal, removals
from sdft_ray.pruning.plan import choose_blocks
from sdft_ray.recipe.pruning import Depth


@dataclass(frozen=True)
class Scores:
    """What is measured of a model of L blocks; the lower right of the matrices is None."""

    block_influence_L: list[float]
    angular_last_LN: list[list[float | None]] = field(default_factory=list)
    angular_mean_LN: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Losses:
    num_removed: int
    one_loss_L: list[float]
    run_loss_S: list[float]


def config(num_blocks: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 2,
    }


blocks_and_removed = st.integers(2, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


def values(count: int) -> st.SearchStrategy[list[float]]:
    """Tenths, so that there are equals among them, and sums that binary floating point rounds."""
    return st.lists(st.integers(0, 12).map(lambda tenths: tenths / 10), min_size=count, max_size=count)


def matrices(num_blocks: int) -> st.SearchStrategy[list[list[float | None]]]:
    def fill(flat: list[float]) -> list[list[float | None]]:
        each = iter(flat)
        return [
            [next(each) if start + n <= num_blocks else None for start in range(num_blocks)]
            for n in range(1, num_blocks)
        ]

    return values(num_blocks * num_blocks).map(fill)


def check_order(found: list[Removal], num_blocks: int, num_removed: int) -> None:
    """Ascending, each once, each of as many blocks of the model as are asked for."""
    assert [removal.score for removal in found] == sorted(removal.score for removal in found)
    sets = [removal.blocks for removal in found]
    assert len(set(sets)) == len(sets)
    for blocks in sets:
        assert len(blocks) == num_removed
        assert list(blocks) == sorted(set(blocks))
        assert blocks[0] >= 0
        assert blocks[-1] < num_blocks


def check_runs(found: list[Removal], num_blocks: int, num_removed: int, scores: list[float | None]) -> None:
    """One for each place where a run can start, with that place's score."""
    assert len(found) == num_blocks - num_removed + 1
    for removal in found:
        start = removal.blocks[0]
        assert removal.blocks == tuple(range(start, start + num_removed))
        assert removal.score == scores[start]


def check_swapped(found: list[Removal], scores: list[float], num_removed: int) -> None:
    """The choice, and all sets that differ from it in one block; no other set is better than the second."""
    assert len(found) == 1 + num_removed * (len(scores) - num_removed)
    chosen = set(found[0].blocks)
    assert all(len(chosen - set(removal.blocks)) == 1 for removal in found[1:])
    for removal in found:
        assert removal.score == pytest.approx(sum(scores[block] for block in removal.blocks))
    every = sorted(math.fsum(scores[b] for b in blocks) for blocks in combinations(range(len(scores)), num_removed))
    assert [removal.score for removal in found[:2]] == pytest.approx(every[:2])


@settings(deadline=None, max_examples=60)
@given(blocks_and_removed, st.sampled_from(["last", "mean"]), st.data())
def test_angular_distance(shape: tuple[int, int], position: str, data: st.DataObject) -> None:
    num_blocks, num_removed = shape
    scores = Scores(*data.draw(st.tuples(values(num_blocks), matrices(num_blocks), matrices(num_blocks))))
    depth = Depth.model_validate({"position": position, "remove_blocks": num_removed})
    found = removals(depth, scores, None, num_blocks, num_removed)
    assert found[0].blocks == choose_blocks(depth, config(num_blocks), scores).removed_blocks
    check_order(found, num_blocks, num_removed)
    matrix = scores.angular_last_LN if position == "last" else scores.angular_mean_LN
    check_runs(found, num_blocks, num_removed, matrix[num_removed - 1])


@settings(deadline=None, max_examples=60)
@given(blocks_and_removed, st.data())
def test_block_influence(shape: tuple[int, int], data: st.DataObject) -> None:
    num_blocks, num_removed = shape
    zeros: list[list[float | None]] = [[0.0] * num_blocks] * (num_blocks - 1)
    scores = Scores(data.draw(values(num_blocks)), zeros, zeros)
    depth = Depth(metric="block_influence", remove_blocks=num_removed)
    found = removals(depth, scores, None, num_blocks, num_removed)
    assert found[0].blocks == choose_blocks(depth, config(num_blocks), scores).removed_blocks
    check_order(found, num_blocks, num_removed)
    check_swapped(found, scores.block_influence_L, num_removed)


@settings(deadline=None, max_examples=60)
@given(blocks_and_removed, st.sampled_from(["run", "one"]), st.data())
def test_perplexity(shape: tuple[int, int], drop: str, data: st.DataObject) -> None:
    num_blocks, num_removed = shape
    num_runs = num_blocks - num_removed + 1
    losses = Losses(num_removed, data.draw(values(num_blocks)), data.draw(values(num_runs)))
    depth = Depth.model_validate({"metric": "perplexity", "drop": drop, "remove_blocks": num_removed})
    found = removals(depth, Scores([]), losses, num_blocks, num_removed)
    assert found[0].blocks == choose_blocks(depth, config(num_blocks), losses).removed_blocks
    check_order(found, num_blocks, num_removed)
    if drop == "run":
        check_runs(found, num_blocks, num_removed, list(losses.run_loss_S))
    else:
        check_swapped(found, losses.one_loss_L, num_removed)


@pytest.mark.parametrize(
    "depth",
    [
        Depth(metric="tail", remove_blocks=2),
        Depth(metric="first", remove_blocks=2),
        Depth(metric="random", remove_blocks=2),
        Depth(metric="explicit", blocks=(0, 3)),
        Depth(metric="tail", position="last", remove_blocks=2),
    ],
)
def test_metrics_that_measure_nothing_are_answered_by_the_mean_distance(depth: Depth) -> None:
    last: list[list[float | None]] = [[0.1, 0.1, 0.1, 0.1], [0.0, 0.1, 0.2, None], [0.0, 0.0, None, None]]
    mean: list[list[float | None]] = [[0.1, 0.1, 0.1, 0.1], [0.5, 0.3, 0.4, None], [0.0, 0.0, None, None]]
    found = removals(depth, Scores([0.0] * 4, last, mean), None, 4, 2)
    assert found == [Removal((1, 2), 0.3), Removal((2, 3), 0.4), Removal((0, 1), 0.5)]


def test_swaps_by_hand() -> None:
    depth = Depth(metric="block_influence", remove_blocks=2)
    found = removals(depth, Scores([0.5, 0.0, 0.25, 0.125]), None, 4, 2)
    assert found == [
        Removal((1, 3), 0.125),
        Removal((1, 2), 0.25),
        Removal((2, 3), 0.375),
        Removal((0, 1), 0.5),
        Removal((0, 3), 0.625),
    ]
