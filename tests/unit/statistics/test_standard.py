"""The standard interval against scipy's bootstrap and against the published formula, term by term."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sdft_ray.errors import EvaluationError
from sdft_ray.statistics.paired import paired_bootstrap
from sdft_ray.statistics.scores import Scores, TaskScore
from sdft_ray.statistics.standard import standard_difference


def scores(**tasks: np.ndarray) -> Scores:
    return Scores(
        {
            name: TaskScore(
                name, "acc", "none", float(items.mean()), None, len(items), 0, True, 0.0,
                {str(i): float(value) for i, value in enumerate(items)},
            )
            for name, items in tasks.items()
        }
    )  # fmt: skip


def answers(seed: int, num_items: int, *, is_graded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    first = random.random(num_items)
    second = np.clip(first + random.normal(0.03, 0.2, num_items), 0, 1)
    return (first, second) if is_graded else ((first > 0.4).astype(float), (second > 0.4).astype(float))


@pytest.mark.slow
@pytest.mark.parametrize("is_graded", [False, True])
def test_limits_against_scipy(is_graded: bool) -> None:
    first, second = answers(0, 300, is_graded=is_graded)
    found = standard_difference(scores(a=first), scores(a=second), draws=40_000)
    expected = stats.bootstrap(
        (second - first,), np.mean, method="percentile", n_resamples=20_000, vectorized=True,
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx((second - first).mean())
    assert found.stderr == pytest.approx(stats.sem(second - first))
    tolerance = 0.05 * stats.sem(second - first) + (0 if is_graded else 1 / 300)  # resampled means are whole items
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=tolerance)


def test_the_clustered_error_term_by_term() -> None:
    first, second = answers(1, 40)
    moves, cluster = second - first, [i // 4 for i in range(40)]
    mean, n = moves.mean(), len(moves)
    across = sum(
        (moves[i] - mean) * (moves[j] - mean) for i in range(n) for j in range(n) if i != j and cluster[i] == cluster[j]
    )
    expected = math.sqrt(moves.var(ddof=1) / n + across / n**2)
    found = standard_difference(scores(a=first), scores(a=second), cluster_of=lambda task, item: f"{int(item) // 4}")
    assert found.stderr == pytest.approx(expected)


def test_several_tasks_are_independent_and_equally_weighted() -> None:
    pairs = {"a": answers(2, 50), "b": answers(3, 200)}
    first, second = (scores(**{name: pair[model] for name, pair in pairs.items()}) for model in (0, 1))
    found = standard_difference(first, second)
    errors = [stats.sem(pair[1] - pair[0]) for pair in pairs.values()]
    assert found.value == pytest.approx(np.mean([(pair[1] - pair[0]).mean() for pair in pairs.values()]))
    assert found.stderr == pytest.approx(math.hypot(*errors) / 2)
    assert found.value == paired_bootstrap(first, second).value


def test_edges() -> None:
    one = scores(a=np.ones(1))
    found = standard_difference(one, one)
    assert (found.value, found.stderr, found.low, found.high) == (0.0, None, 0.0, 0.0)
    same = scores(a=np.ones(20))
    assert standard_difference(same, same).stderr == 0.0
    with pytest.raises(EvaluationError, match="level of an interval is 1"):
        standard_difference(same, same, level=1.0)
    with pytest.raises(EvaluationError, match="not both scored on 'b'"):
        standard_difference(same, scores(a=np.ones(20), b=np.ones(20)))


def test_both_are_too_narrow_where_few_items_differ() -> None:
    """Exact coverage as in numerics/test_interval_coverage: the second model loses some items of 200, gains none."""
    num_items, most = 200, 40
    limits: dict[str, list[tuple[float, float]]] = {"percentile": [], "stderr": []}
    for lost in range(most + 1):
        second = (np.arange(num_items) >= lost).astype(float)
        found = standard_difference(scores(a=np.ones(num_items)), scores(a=second))
        assert found.stderr is not None
        half = 1.96 * found.stderr
        limits["percentile"].append((found.low, found.high))
        limits["stderr"].append((found.value - half, found.value + half))
    truths = np.linspace(2.5, 20, 71) / num_items
    probability_LT = stats.binom.pmf(np.arange(most + 1)[:, None], num_items, truths)
    covered = {
        name: float(
            (probability_LT * [[low <= -truth <= high for truth in truths] for low, high in pairs]).sum(axis=0).min()
        )
        for name, pairs in limits.items()
    }
    assert covered["percentile"] < 0.85
    assert covered["stderr"] < 0.85
