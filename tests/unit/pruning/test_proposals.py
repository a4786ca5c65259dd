"""What `best` compares: every metric's own choice, each set once, and the next best runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from sdft_ray.errors import PlanError
from sdft_ray.pruning.plan import choose_blocks
from sdft_ray.pruning.proposals import METRICS, proposals, sets_to_measure
from sdft_ray.recipe.pruning import Depth

L, N = 9, 3
CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": L, "num_attention_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    angular_last_LN: list[list[float | None]]
    angular_mean_LN: list[list[float | None]]
    block_influence_L: list[float]


@dataclass(frozen=True)
class Losses:
    num_removed: int
    one_loss_L: list[float]
    run_loss_S: list[float]


def matrix(rng: random.Random) -> list[list[float | None]]:
    return [[rng.random() if start + n <= L else None for start in range(L)] for n in range(1, L)]


@pytest.mark.parametrize("seed", range(8))
def test_each_metric_proposes_what_it_would_remove(seed: int) -> None:
    rng = random.Random(seed)
    scores = Scores(matrix(rng), matrix(rng), [rng.random() for _ in range(L)])
    losses = Losses(N, [rng.random() for _ in range(L)], [rng.random() for _ in range(L - N + 1)])
    found = proposals(scores, losses, CONFIG, N)
    by_metric = {name: proposal.blocks for proposal in found for name in proposal.metrics}
    assert set(by_metric) == set(METRICS)
    for name, asked in METRICS.items():
        depth = Depth.model_validate({**asked, "remove_blocks": N})
        measured = losses if depth.metric == "perplexity" else scores
        assert by_metric[name] == choose_blocks(depth, CONFIG, measured).removed_blocks
    sets = [proposal.blocks for proposal in found]
    assert len(set(sets)) == len(sets)
    best_runs = sorted(range(L - N + 1), key=lambda start: losses.run_loss_S[start])[:3]
    assert {tuple(range(start, start + N)) for start in best_runs} <= set(sets)
    assert sets_to_measure(found) == [(), *sets]


@dataclass(frozen=True)
class Sets:
    removed: tuple[tuple[int, ...], ...]
    loss_C: tuple[float, ...]


def test_best_takes_the_lowest_loss_and_never_the_whole_model() -> None:
    depth = Depth(metric="best", remove_blocks=2)
    sets = Sets(((), (1, 2), (0, 4), (3, 4)), (1.0, 3.0, 2.0, 2.0))
    assert choose_blocks(depth, CONFIG, sets).removed_blocks == (0, 4), "the first of equals"
    with pytest.raises(PlanError, match="not those without 2 blocks"):
        choose_blocks(depth, CONFIG, Sets(((), (1, 2, 3)), (1.0, 2.0)))
    with pytest.raises(PlanError, match="not those without 2 blocks"):
        choose_blocks(depth, CONFIG, Sets(((),), (1.0,)))
