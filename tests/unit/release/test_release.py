"""Bounds on a retention card: what passes, what does not, and the sentences that say why."""

from __future__ import annotations

from typing import Any

import pytest

from sdft_ray.evaluation.card import Card, retention_card
from sdft_ray.evaluation.release import Bounds, Judgement, judge
from sdft_ray.statistics.scores import Scores, TaskScore

N = 100


def model(num_right: dict[str, int], **changes: Any) -> Scores:
    """Tasks of 100 items of which the first so many are right."""
    tasks = {}
    for task, right in num_right.items():
        items = {str(i): float(i < right) for i in range(N)}
        fields: dict[str, Any] = {
            "task": task, "metric": "acc", "filter": "none", "value": right / N, "stderr": 0.04, "n": N,
            "num_fewshot": 0, "higher_is_better": True, "chance": 0.0, "items": items,
        }  # fmt: skip
        tasks[task] = TaskScore(**fields | changes)
    return Scores(tasks)


def card(teacher: dict[str, int], pruned: dict[str, int], student: dict[str, int], **changes: Any) -> Card:
    return retention_card(*(model(part, **changes) for part in (teacher, pruned, student)))


GOOD = card({"sums": 90, "facts": 80}, {"sums": 5, "facts": 60}, {"sums": 81, "facts": 72})


def test_within_all_bounds() -> None:
    assert judge(GOOD, Bounds(0.9, 0.9, no_task_below_pruned=True)) == Judgement(True, ())
    assert judge(GOOD, Bounds()) == Judgement(True, ())


def test_a_low_mean() -> None:
    found = judge(GOOD, Bounds(min_recovery=0.95))
    interval = GOOD.recovery_interval
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    reach = f"95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %"
    assert found == Judgement(False, (f"Mean recovery is 90.0 % ({reach}), below the bound of 95.0 %.",))


def test_figures_have_as_many_decimals_as_tell_them_apart() -> None:
    near = card({"sums": 93}, {"sums": 5}, {"sums": 80})  # 86.0215 %
    (reason,) = judge(near, Bounds(min_recovery=0.8603)).reasons
    assert reason.startswith("Mean recovery is 86.02 % (")
    assert reason.endswith("below the bound of 86.03 %.")


def test_every_low_task_is_named() -> None:
    low = card(
        {"sums": 90, "facts": 80, "lists": 50},
        {"sums": 5, "facts": 5, "lists": 5},
        {"sums": 45, "facts": 80, "lists": 30},
    )
    reasons = judge(low, Bounds(min_task_recovery=0.7)).reasons
    assert [reason.split(" ± ")[0] for reason in reasons] == [
        "Recovery on sums is 50.0 %",
        "Recovery on lists is 60.0 %",
    ]
    assert all(reason.endswith(", below the bound of 70.0 %.") for reason in reasons)


def test_a_task_below_the_pruned_model_counts_beyond_chance_alone() -> None:
    noise = card({"sums": 90, "facts": 80}, {"sums": 5, "facts": 60}, {"sums": 81, "facts": 58})
    assert [reversal.task for reversal in noise.reversals] == ["facts"]
    assert judge(noise, Bounds(no_task_below_pruned=True)).releasable
    worse = card({"sums": 90, "facts": 80}, {"sums": 5, "facts": 60}, {"sums": 81, "facts": 40})
    assert judge(worse, Bounds(min_recovery=0.5)).releasable
    (reason,) = judge(worse, Bounds(no_task_below_pruned=True)).reasons
    interval = worse.reversals[0].comparison.interval
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    assert -0.3 < interval.low < -0.2 < interval.high < -0.1
    ends = f"\u2212{-interval.low:.3f} to \u2212{-interval.high:.3f}"
    assert reason == (
        "Fine-tuning made facts worse than pruning alone: by 0.200 (95 % interval of the difference "
        f"{ends}; p = 9.5e-07 after Holm's correction for all tasks)."
    )  # fmt: skip


def test_one_of_many_tasks_that_looks_worse_by_chance_is_no_reason() -> None:
    """Six items lost of 100 and none gained: beyond chance by itself, not among eight tasks."""
    alone = card({"facts": 90}, {"facts": 80}, {"facts": 74})
    assert [reversal.is_beyond_chance for reversal in alone.reversals] == [True]
    others = dict.fromkeys((f"same{i}" for i in range(7)), 50)
    many = card({"facts": 90, **others}, {"facts": 80, **others}, {"facts": 74, **others})
    (reversal,) = many.reversals
    assert reversal.is_beyond_chance is False
    assert reversal.p_holm == pytest.approx(8 * (alone.reversals[0].p_holm or 0))
    assert judge(many, Bounds(no_task_below_pruned=True)).releasable
    assert not judge(alone, Bounds(no_task_below_pruned=True)).releasable


def test_a_reversal_that_nobody_can_test_is_no_pass() -> None:
    blind = card({"sums": 90}, {"sums": 60}, {"sums": 59}, items={})
    (reason,) = judge(blind, Bounds(no_task_below_pruned=True)).reasons
    assert reason == (
        "Fine-tuning made sums worse than pruning alone: by 0.010, and without values per item it cannot be told "
        "whether that is chance."
    )  # fmt: skip


@pytest.mark.parametrize("bounds", [Bounds(min_recovery=0.1), Bounds(min_task_recovery=0.1)])
def test_a_teacher_at_nothing_never_passes_silently(bounds: Bounds) -> None:
    """Its mean is 1.04 times the teacher's, for the sums that the teacher cannot do."""
    zero = card({"sums": 0, "facts": 80}, {"sums": 0, "facts": 60}, {"sums": 5, "facts": 78})
    assert judge(zero, bounds) == Judgement(False, ("Recovery on sums is undefined: the teacher scores 0.",))
    assert judge(zero, Bounds(no_task_below_pruned=True)).releasable


def test_a_mean_that_is_undefined() -> None:
    zero = card({"sums": 0}, {"sums": 0}, {"sums": 5})
    assert judge(zero, Bounds(min_recovery=0.5)).reasons == (
        "Recovery on sums is undefined: the teacher scores 0.",
        "Mean recovery is undefined: there is no task on which the teacher scores above 0.",
    )


def test_where_lower_is_better_no_ratio_can_pass() -> None:
    both = [
        Scores(model({"sums": sums}).tasks | model({"ppl": ppl}, higher_is_better=False, metric="ppl").tasks)
        for sums, ppl in ((90, 20), (10, 50), (85, 80))
    ]
    found = retention_card(*both)
    assert judge(found, Bounds(min_recovery=0.9)).releasable  # the card says that the mean leaves it out
    assert found.left_out == ("ppl",)
    reasons = judge(found, Bounds(min_task_recovery=0.9, no_task_below_pruned=True)).reasons
    assert reasons[0] == "Recovery on ppl is undefined: lower is better for ppl."
    assert reasons[1].startswith("Fine-tuning made ppl worse than pruning alone: by 0.300 (")


def test_a_score_that_is_no_number_passes_nothing() -> None:
    scores = model({"sums": 90})
    broken = model({"sums": 90}, value=float("nan"), items={})
    found = retention_card(scores, scores, broken)
    reasons = judge(found, Bounds(min_recovery=0.5, no_task_below_pruned=True)).reasons
    assert reasons == (
        "Recovery on sums is undefined: a score is not a number.",
        "Mean recovery is undefined: there is no task on which the teacher scores above 0.",
        "Whether sums is worse than after pruning alone cannot be told: a score is not a number.",
    )
