"""Crossed intervals: mean squares by naive loops, Student's t where one side is all, and the delta method."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.recovery import recovery
from sdft_ray.statistics.crossed import CrossedEstimate, crossed_difference, crossed_mean, crossed_recovery
from sdft_ray.statistics.scores import Scores, TaskScore

Array = np.ndarray
SMALL = np.array([[1.0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1]])
"""3 seeds by 4 items."""


def tables(seed: int, num_seeds: int, *sizes: int, between: float = 0.1) -> dict[str, Array]:
    """0/1 values of tasks of these sizes, with seeds, items and the rest at random."""
    random = np.random.default_rng(seed)
    seeds = random.normal(0, between, (num_seeds, 1))
    found = {}
    for task, size in enumerate(sizes):
        ease = 0.7 + seeds + random.normal(0, 0.2, size) + random.normal(0, 0.1, (num_seeds, 1))
        found[f"t{task}"] = (random.random((num_seeds, size)) < ease).astype(float)
    return found


def naive_mean_squares(table: Array) -> tuple[float, float, float]:
    """Of seeds, items and the rest, cell by cell."""
    num_seeds, num_items = table.shape
    mean = table.sum() / table.size
    rows = [sum(table[s]) / num_items for s in range(num_seeds)]
    columns = [sum(table[:, i]) / num_seeds for i in range(num_items)]
    of_seeds = num_items * sum((row - mean) ** 2 for row in rows) / (num_seeds - 1)
    of_items = num_seeds * sum((column - mean) ** 2 for column in columns) / (num_items - 1)
    rest = sum(
        (table[s, i] - rows[s] - columns[i] + mean) ** 2 for s in range(num_seeds) for i in range(num_items)
    )  # fmt: skip
    return of_seeds, of_items, rest / ((num_seeds - 1) * (num_items - 1))


def ends(found: CrossedEstimate) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9)


def test_one_task_by_hand() -> None:
    """Means 3/4, 1/2, 1/2 of seeds and 2/3, 0, 2/3, 1 of items, 7/12 in all: worked out on paper."""
    found = crossed_mean({"a": SMALL})
    assert found.value == near(7 / 12)
    assert found.seed_stderr == near(math.sqrt(1 / 48 / 3))  # variance of 3/4, 1/2, 1/2 is 1/48
    items, rest = 3 * (19 / 36) / 3, 7 / 6 / 6  # squares of 12 cells: 35/12 = 2/12 (seeds) + 19/12 (items) + 14/12
    assert naive_mean_squares(SMALL)[1:] == (pytest.approx(items), pytest.approx(rest))
    assert found.item_stderr == near(math.sqrt((items - rest) / 12))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_variance_is_that_of_the_mean_squares(num_seeds: int) -> None:
    """One task: var(mean) = (MS_seeds + MS_items - MS_rest) / (S I), with Satterthwaite's degrees of freedom."""
    (table,) = tables(1, num_seeds, 60).values()
    found = crossed_mean({"a": table})
    squares, size = naive_mean_squares(table), table.size
    variance = (squares[0] + squares[1] - squares[2]) / size
    assert found.stderr == near(math.sqrt(variance))
    dfs = num_seeds - 1, 59, (num_seeds - 1) * 59
    assert found.df == near(variance**2 / sum((part / size) ** 2 / df for part, df in zip(squares, dfs, strict=True)))


def test_several_tasks_share_seeds_but_not_items() -> None:
    values = tables(2, 5, 40, 90, 25)
    found = crossed_mean(values)
    assert found.value == near(np.mean([table.mean() for table in values.values()]))
    overall = [np.mean([table[s].mean() for table in values.values()]) for s in range(5)]
    assert found.seed_stderr == near(np.std(overall, ddof=1) / math.sqrt(5))
    variance = 0.0
    for table in values.values():
        _, items, rest = naive_mean_squares(table)
        variance += (items - rest) / table.size / 9
    assert found.item_stderr == near(math.sqrt(variance))
    assert found.stderr == near(math.hypot(found.seed_stderr or 0, found.item_stderr or 0))


@pytest.mark.slow
def test_errors_are_right_on_average() -> None:
    """Over many worlds the mean of stderr^2 is the variance of the mean itself."""
    found = [crossed_mean(tables(seed, 4, 30, 20)) for seed in range(3000)]
    values = np.array([one.value for one in found], float)
    assert np.mean([(one.stderr or 0) ** 2 for one in found]) == pytest.approx(values.var(ddof=1), rel=0.08)


def test_seeds_alone_are_a_t_interval_over_seeds() -> None:
    """Every item alike: only seeds vary."""
    by_seed = np.array([0.7, 0.74, 0.69, 0.81])
    found = crossed_mean({"a": np.tile(by_seed[:, None], (1, 6)), "b": np.tile(by_seed[:, None], (1, 9)) - 0.1})
    theory = ttest_1samp(by_seed - 0.05, 0).confidence_interval(0.95)
    assert ends(found) == pytest.approx((theory.low, theory.high))
    assert found.item_stderr == pytest.approx(0, abs=1e-12)
    assert found.df == pytest.approx(3)


def test_a_single_seed_is_a_t_interval_over_items() -> None:
    values = np.random.default_rng(3).random(50)
    found = crossed_mean({"a": values[None]}, level=0.9)
    theory = ttest_1samp(values, 0).confidence_interval(0.9)
    assert ends(found) == pytest.approx((theory.low, theory.high))
    assert found.seed_stderr is None
    assert found.item_stderr == found.stderr == near(values.std(ddof=1) / math.sqrt(50))
    assert found.df == pytest.approx(49)


def half_width(found: CrossedEstimate) -> float:
    low, high = ends(found)
    assert (low + high) / 2 == pytest.approx(found.value)
    return (high - low) / 2


def test_with_two_seeds_limits_are_howes() -> None:
    (table,) = tables(4, 2, 500).values()
    found = crossed_mean({"a": table})
    assert found.seed_stderr is not None
    assert found.item_stderr is not None
    howe = math.hypot(t.ppf(0.975, 1) * found.seed_stderr, t.ppf(0.975, 499) * found.item_stderr)
    assert half_width(found) == pytest.approx(howe, rel=1e-3)  # the items' own degrees of freedom are not quite 499


@pytest.mark.parametrize("num_seeds", [3, 6])
def test_with_more_seeds_part_of_the_rest_has_its_own_quantile(num_seeds: int) -> None:
    (table,) = tables(4, num_seeds, 2000).values()
    found = crossed_mean({"a": table})
    squares = naive_mean_squares(table)
    known = (num_seeds - 2) / (num_seeds - 1) * squares[2] / table.size
    parts = [
        (squares[0] / table.size - known, num_seeds - 1),
        (known, 2000),
        ((squares[1] - squares[2]) / table.size, 2000),
    ]
    assert parts[0][0] > 0
    reach = math.sqrt(sum(t.ppf(0.975, df) ** 2 * part for part, df in parts))
    assert half_width(found) == pytest.approx(reach, rel=2e-3)


def test_items_that_do_not_matter_reach_no_farther_than_their_mean_square() -> None:
    """It barely exceeds that of the rest, and their difference has next to no degrees of freedom."""
    random, fewest = np.random.default_rng(8), math.inf
    for _ in range(300):
        table = (random.random((2, 40)) < 0.7).astype(float)
        of_seeds, of_items, rest = naive_mean_squares(table)
        difference = max(0.0, of_items - rest)
        fewest = min(fewest, difference**2 / ((of_items**2 + rest**2) / 39) or math.inf)
        most = math.sqrt((t.ppf(0.975, 39) ** 2 * of_items + t.ppf(0.975, 1) ** 2 * of_seeds) / table.size)
        found = crossed_mean({"a": table})
        assert (found.low is None) == (of_seeds == difference == 0)
        assert found.low is None or half_width(found) <= most * (1 + 1e-9)
    assert fewest < 0.1


def test_where_nothing_varies_nothing_is_known() -> None:
    found = crossed_mean({"a": np.ones((3, 20)), "b": np.full((3, 7), 0.1)})
    assert (found.value, found.stderr) == (pytest.approx(0.55), pytest.approx(0, abs=1e-12))
    assert (found.low, found.high, found.df) == (None, None, None)


def test_the_difference_is_paired_on_seeds_and_items() -> None:
    first = tables(5, 4, 60, 30, between=0.3)
    random = np.random.default_rng(0)
    second = {task: np.where(random.random(table.shape) < 0.05, 1 - table, table) for task, table in first.items()}
    found = crossed_difference(first, second)
    assert found.value == near(np.mean([second[task].mean() - first[task].mean() for task in first]))
    by_seed = [np.mean([(second[task] - first[task])[s].mean() for task in first]) for s in range(4)]
    assert found.seed_stderr == near(np.std(by_seed, ddof=1) / 2)
    alone = crossed_mean(second)
    assert found.stderr is not None
    assert alone.stderr is not None
    assert found.stderr < 0.5 * alone.stderr


def scored(values: dict[str, Array]) -> Scores:
    return Scores({
        task: TaskScore(
            task, "acc", "none", float(items.mean()), float(items.std(ddof=1) / len(items) ** 0.5), len(items), 0, True,
            0.0, {str(i): float(value) for i, value in enumerate(items)},
        ) for task, items in values.items()
    })  # fmt: skip


def test_recovery_of_a_single_seed_is_that_of_the_delta_method() -> None:
    teacher = {task: table[0] for task, table in tables(6, 1, 80, 120).items()}
    students = tables(7, 1, 80, 120)
    found = crossed_recovery(students, teacher)
    theory = recovery(scored(teacher), scored({task: table[0] for task, table in students.items()})).mean
    assert theory.value is not None
    assert theory.stderr is not None
    assert found.value == near(theory.value)
    assert found.stderr == near(theory.stderr)
    assert sum(ends(found)) / 2 == near(theory.value)


def test_recovery_of_several_seeds() -> None:
    """Against the same figure of each seed: their spread is the seeds' part, as the teacher is the same for all."""
    teacher = {task: table[0] for task, table in tables(8, 1, 80, 120).items()}
    students = tables(9, 5, 80, 120)
    found = crossed_recovery(students, teacher)
    whole = np.mean([items.mean() for items in teacher.values()])
    by_seed = [np.mean([table[s].mean() for table in students.values()]) / whole for s in range(5)]
    assert found.value == near(np.mean(by_seed))
    assert found.seed_stderr == near(np.std(by_seed, ddof=1) / math.sqrt(5))
    same = crossed_recovery({task: np.stack([items] * 3) for task, items in teacher.items()}, teacher)
    assert (same.value, same.stderr) == (near(1.0), pytest.approx(0, abs=1e-12))


def test_a_teacher_that_scores_nothing_has_no_recovery() -> None:
    assert crossed_recovery({"a": SMALL}, {"a": np.zeros(4)}) == CrossedEstimate(
        None, None, None, None, None, None, None
    )


def test_refusals() -> None:
    cases = [
        (lambda: crossed_mean({}), "no task to take a mean over"),
        (lambda: crossed_mean({"a": SMALL[0]}), r"values of 'a' are of shape \(4,\)"),
        (lambda: crossed_mean({"a": SMALL[:, :1]}), r"values of 'a' are of shape \(3, 1\)"),
        (lambda: crossed_mean({"a": SMALL, "b": SMALL[:2]}), "'a' has 3 seeds and 'b' has 2"),
        (lambda: crossed_difference({"a": SMALL}, {"b": SMALL}), "only one side was scored on 'a'"),
        (lambda: crossed_difference({"a": SMALL}, {"a": SMALL[:2]}), r"of shapes \(3, 4\) and \(2, 4\)"),
        (lambda: crossed_difference({"a": SMALL}, {"a": SMALL[:, :2]}), r"of shapes \(3, 4\) and \(3, 2\)"),
        (lambda: crossed_recovery({"a": SMALL}, {"a": np.ones(3)}), r"of shapes \(3, 4\) and \(3,\)"),
        (lambda: crossed_recovery({"a": SMALL}, {}), "only one side was scored on 'a'"),
    ]
    for call, message in cases:
        with pytest.raises(EvaluationError, match=message):
            call()
