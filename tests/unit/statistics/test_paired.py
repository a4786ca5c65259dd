"""Paired intervals against enumeration, normal theory and the delta method; McNemar's test against scipy."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binomtest, multinomial

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.recovery import recovery
from sdft_ray.statistics import paired
from sdft_ray.statistics.paired import Interval, has_item_values, mcnemar, paired_bootstrap, recovery_interval
from sdft_ray.statistics.scores import Scores, TaskScore

Array = np.ndarray


def score(items: Array, task: str = "a", chance: float | None = 0.0) -> TaskScore:
    stderr = float(items.std(ddof=1) / len(items) ** 0.5) if len(items) > 1 else None
    named = {str(i): float(value) for i, value in enumerate(items)}
    return TaskScore(task, "acc", "none", float(items.mean()), stderr, len(items), 0, True, chance, named)


def scores(**tasks: Array) -> Scores:
    return Scores({name: score(items, name) for name, items in tasks.items()})


def table(both: int, only_first: int, only_second: int, neither: int) -> tuple[Array, Array]:
    """0/1 items of two models with so many in each cell of the 2 x 2 table."""
    counts = (both, only_first, only_second, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


def limits(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def graded(seed: int, num_items: int, drop: float = 0.1) -> tuple[Array, Array]:
    """Values between 0 and 1 that hang together."""
    random = np.random.default_rng(seed)
    ease = random.random(num_items)
    return 0.5 * ease + 0.5 * random.random(num_items), (1 - drop) * (0.5 * ease + 0.5 * random.random(num_items))


# --- the difference -----------------------------------------------------------------------------------------


def exact_limit(num_items: int, only_first: int, only_second: int, side: int) -> float:
    """The tilted limit of one task without drawing: all pairs of counts (first alone, second alone) enumerated."""
    observed = only_second - only_first
    weights = np.array([only_first + 0.5, only_second + 0.5, num_items - only_first - only_second])
    k = np.arange(min(num_items, 90) + 1)
    firsts, seconds = (part.ravel() for part in np.meshgrid(k, k))
    possible = firsts + seconds <= num_items
    counts = np.stack([firsts, seconds, num_items - firsts - seconds], 1)[possible]
    gain = counts[:, 1] - counts[:, 0]
    as_far = np.where(gain == observed, 0.5, side * (observed - gain) > 0)

    def cells(tilt: float) -> Array:
        mass = weights * np.exp(tilt * np.array([-1, 1, 0]))
        return mass / mass.sum()

    tail = lambda tilt: float(as_far @ multinomial.pmf(counts, num_items, cells(tilt))) - 0.025  # noqa: E731
    found = cells(float(brentq(tail, *sorted((0.0, 4.0 * side)))))  # type: ignore[arg-type]
    return float(found[1] - found[0])


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (5, 0), (0, 8), (12, 3), (20, 20)])
def test_limits_against_enumeration(counts: tuple[int, int]) -> None:
    first, second = table(100, *counts, 200 - 100 - sum(counts))
    found = paired_bootstrap(scores(a=first), scores(a=second), draws=20_000)
    assert found.value == pytest.approx((counts[1] - counts[0]) / 200)
    low, high = limits(found)
    reach = high - low
    assert low == pytest.approx(exact_limit(200, *counts, -1), abs=0.03 * reach)
    assert high == pytest.approx(exact_limit(200, *counts, 1), abs=0.03 * reach)


def test_two_models_that_agree_on_everything_are_not_equal_for_certain() -> None:
    """A rule of three: 0 of 200 leaves room for about 3 of 200, either way."""
    first, _ = table(150, 0, 0, 50)
    low, high = limits(paired_bootstrap(scores(a=first), scores(a=first)))
    assert -3.6 / 200 < low < -2.7 / 200
    assert 2.7 / 200 < high < 3.6 / 200
    thrice = scores(a=first, b=first, c=first)
    shared = limits(paired_bootstrap(thrice, thrice))  # together one pair of half items, so a third as wide
    assert shared == pytest.approx((low / 3, high / 3), rel=0.1)


def test_a_difference_on_every_item_stops_at_one() -> None:
    first, second = table(0, 0, 50, 0)
    low, high = limits(paired_bootstrap(scores(a=first), scores(a=second)))
    assert 0.85 < low < 0.98
    assert high == 1.0
    assert limits(paired_bootstrap(scores(a=second), scores(a=first))) == pytest.approx((-high, -low), abs=0.01)


@pytest.mark.slow
def test_many_graded_items_against_normal_theory() -> None:
    """Tasks of different size weigh the same, and their variances add up."""
    drawn = {"a": graded(1, 500), "b": graded(2, 300, drop=0.4), "c": graded(3, 900)}
    first, second = (scores(**{name: pair[i] for name, pair in drawn.items()}) for i in (0, 1))
    moves = [pair[1] - pair[0] for pair in drawn.values()]
    mean = np.mean([move.mean() for move in moves])
    stderr = np.sqrt(sum(move.var(ddof=1) / len(move) for move in moves)) / 3
    found = paired_bootstrap(first, second, draws=4000)
    assert found.value == pytest.approx(mean)
    assert limits(found) == pytest.approx((mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.1 * stderr)
    low, high = limits(paired_bootstrap(first, second, draws=4000, level=0.99))
    assert (low, high) == pytest.approx((mean - 2.576 * stderr, mean + 2.576 * stderr), abs=0.15 * stderr)
    alone = paired_bootstrap(first, second, tasks=["b"])
    assert alone.value == pytest.approx(moves[1].mean())


def test_pairing_narrows_the_interval() -> None:
    first, second = graded(4, 500)
    shuffled = np.random.default_rng(0).permutation(second)
    low, high = limits(paired_bootstrap(scores(a=first), scores(a=second)))
    low_apart, high_apart = limits(paired_bootstrap(scores(a=first), scores(a=shuffled)))
    assert high - low < 0.8 * (high_apart - low_apart)


def test_the_order_of_items_does_not_matter_and_the_seed_fixes_all() -> None:
    first, second = table(70, 20, 9, 21)
    given = paired_bootstrap(scores(a=first), scores(a=second), seed=3)
    other = score(second)
    backwards = Scores({"a": replace(other, items=dict(reversed(other.items.items())))})
    assert paired_bootstrap(scores(a=first), backwards, seed=3) == given
    assert paired_bootstrap(scores(a=first), scores(a=second), seed=4) != given


def test_both_ways_of_drawing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = scores(a=table(70, 20, 9, 101)[0]), scores(a=table(70, 20, 9, 101)[1])
    by_counts = limits(paired_bootstrap(first, second, draws=20_000))
    monkeypatch.setattr(paired, "_FEW_CELLS", 0)
    by_items = limits(paired_bootstrap(first, second, draws=20_000))
    assert by_items == pytest.approx(by_counts, abs=0.002)
    monkeypatch.setattr(paired, "_NUMBERS_AT_ONCE", 70_000)
    assert limits(paired_bootstrap(first, second, draws=20_000)) == pytest.approx(by_items, abs=1e-9)


@pytest.mark.slow
def test_memory_is_bounded_for_many_items() -> None:
    pair = graded(5, 14_000)
    first, second = (scores(a=items) for items in pair)
    tracemalloc.start()
    found = paired_bootstrap(first, second, draws=400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20  # all draws at once would be 400 * 14,000 * 8 bytes and more than once
    move = pair[1] - pair[0]
    low, high = limits(found)
    assert high - low == pytest.approx(2 * 1.96 * move.std() / 14_000**0.5, rel=0.15)


def test_tasks_where_lower_is_better_are_left_out_unless_named() -> None:
    first, second = table(70, 20, 9, 21)
    worse = Scores({"ppl": replace(score(second), task="ppl", higher_is_better=False), "a": score(second)})
    base = Scores({"ppl": replace(score(first), task="ppl", higher_is_better=False), "a": score(second)})
    assert paired_bootstrap(base, worse).value == 0.0
    assert paired_bootstrap(base, worse, tasks=["ppl"]).value == pytest.approx(second.mean() - first.mean())


# --- recovery -----------------------------------------------------------------------------------------------


def test_recovery_against_the_delta_method() -> None:
    drawn = {name: table(*counts) for name, counts in {
        "a": (600, 150, 30, 220), "b": (900, 50, 50, 200), "c": (300, 300, 60, 340),
    }.items()}  # fmt: skip
    chances = {"a": 0.0, "b": 0.25, "c": None}
    teacher, student = (
        Scores({name: score(pair[i], name, chances[name]) for name, pair in drawn.items()}) for i in (0, 1)
    )
    for corrected in (False, True):
        theory = recovery(teacher, student, chance_corrected=corrected).mean
        assert theory.value is not None
        assert theory.stderr is not None
        found = recovery_interval(teacher, student, chance_corrected=corrected, draws=8000)
        assert found.value == pytest.approx(theory.value)
        ends = (theory.value - 1.96 * theory.stderr, theory.value + 1.96 * theory.stderr)
        assert limits(found) == pytest.approx(ends, abs=0.1 * theory.stderr)
    with pytest.raises(EvaluationError, match="score of random guessing on 'c' is not known"):
        recovery_interval(teacher, student, chance_corrected=True, tasks=["a", "c"])


def test_recovery_is_whole_where_the_difference_is_nothing() -> None:
    first, second = table(150, 6, 6, 38)
    found = recovery_interval(scores(a=first), scores(a=second))
    difference = paired_bootstrap(scores(a=first), scores(a=second))
    assert found.value == 1.0
    ends = limits(difference)
    assert limits(found) == pytest.approx((1 + ends[0] / first.mean(), 1 + ends[1] / first.mean()), rel=0.005)


def test_a_teacher_that_scores_nothing_has_no_recovery() -> None:
    first, second = table(0, 0, 5, 95)
    assert recovery_interval(scores(a=first), scores(a=second)) == Interval(None, None, None)
    few, more = table(1, 0, 5, 94)
    assert recovery_interval(scores(a=few), scores(a=more)) == Interval(6.0, None, None)
    unknown = Scores({"a": score(more, chance=None)})
    assert recovery_interval(unknown, unknown, chance_corrected=True) == Interval(None, None, None)


def test_a_teacher_near_chance_bounds_nothing() -> None:
    first, second = table(30, 28, 10, 132)  # 0.29 and 0.20 of 200 with four options
    teacher, student = (Scores({"a": score(items, chance=0.25)}) for items in (first, second))
    found = recovery_interval(teacher, student, chance_corrected=True)
    assert found.value == pytest.approx((0.2 - 0.25) / (0.29 - 0.25))
    assert (found.low, found.high) == (None, None)


# --- what cannot be compared --------------------------------------------------------------------------------


def test_refusals() -> None:
    first, second = table(70, 20, 9, 21)
    base = scores(a=first)

    def other(**changes: object) -> Scores:
        return Scores({"a": replace(score(second), **changes)})

    cases = [
        (replace(other(), harness="0.4.13"), {}, "different harness versions cannot be compared.*0.4.11.*0.4.13"),
        (scores(a=second, b=second), {}, "not both scored on 'b'"),
        (other(), {"tasks": ["z"]}, "not both scored on 'z'"),
        (other(), {"tasks": []}, "no task to compare"),
        (other(items={str(i): 1.0 for i in range(119)}), {}, "no common set of items on 'a': 120 and 119, 119 in"),
        (other(items={}), {}, "no common set of items on 'a': 120 and 0"),
        (other(filter="strict"), {}, "scored with different settings on 'a'"),
        (other(num_fewshot=5), {}, "scored with different settings on 'a'"),
        (other(value=0.9), {}, "'a' is not the mean of its items"),
        (other(value=float("nan")), {}, "'a' is not the mean of its items"),
        (other(), {"level": 0.2}, "level of an interval is 0.2"),
    ]
    for found, options, message in cases:
        with pytest.raises(EvaluationError, match=message) as caught:
            paired_bootstrap(replace(base, harness="0.4.11"), found, **options)
        assert caught.value.hint
    known = replace(base, harness="0.4.11")
    assert paired_bootstrap(known, other()).value is not None  # an unknown version passes


def test_has_item_values() -> None:
    whole = score(table(70, 20, 9, 21)[0])
    assert has_item_values(whole, whole)
    assert not has_item_values(whole, replace(whole, items={}))
    assert not has_item_values(replace(whole, value=whole.value + 0.01))


# --- McNemar's test -----------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    assert mcnemar(*map(score, table(10, 0, 0, 5))).p_value == 1.0
    found = mcnemar(*map(score, table(10, 5, 0, 5)))
    assert (found.only_first, found.only_second) == (5, 0)
    assert found.p_value == pytest.approx(2 / 2**5)
    assert mcnemar(*map(score, table(10, 1, 3, 5))).p_value == pytest.approx(2 * (1 + 4) / 2**4)
    assert mcnemar(*map(score, table(10, 4, 4, 5))).p_value == 1.0


@pytest.mark.parametrize("counts", [(1, 0), (6, 1), (3, 9), (40, 62), (1000, 1180), (0, 1500)])
def test_mcnemar_against_scipy(counts: tuple[int, int]) -> None:
    found = mcnemar(*map(score, table(3, *counts, 4)))
    assert found.p_value == pytest.approx(binomtest(counts[0], sum(counts)).pvalue, rel=1e-9)
    assert mcnemar(*map(score, table(3, counts[1], counts[0], 4))).p_value == found.p_value


def test_mcnemar_against_exact_integers() -> None:
    """Twice the sum of binomial coefficients up to the smaller count, over 2^n, as a fraction of whole numbers."""
    for only_first, only_second in [(0, 0), (0, 1), (2, 2), (3, 9), (17, 4), (190, 260), (700, 900)]:
        num = only_first + only_second
        ways = sum(comb(num, k) for k in range(min(only_first, only_second) + 1))
        expected = min(Fraction(1), Fraction(2 * ways, 2**num))
        found = mcnemar(*map(score, table(3, only_first, only_second, 4)))
        assert found.p_value == pytest.approx(float(expected), rel=1e-12)


def test_mcnemar_refusals() -> None:
    first, second = map(score, table(3, 1, 2, 4))
    with pytest.raises(EvaluationError, match="not just right or wrong"):
        mcnemar(first, replace(second, items=second.items | {"0": 0.5}))
    with pytest.raises(EvaluationError, match="no common set of items"):
        mcnemar(first, replace(second, items={name + "x": value for name, value in second.items.items()}))
