"""Report data: a round trip through JSON, and what it refuses."""

from __future__ import annotations

import math

import pytest

from sdft_ray.report.run.model import Plan, ReportData
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report.made_up import distances, recovery_from, report_data


def test_json_round_trip_keeps_everything_and_its_order() -> None:
    data = report_data()
    back = ReportData.from_json(data.to_json())
    assert back == data
    assert list(back.scores) == ["teacher", "pruned", "sft", "sdft"]
    assert list(back.selection) == list(data.selection)


def test_json_round_trip_of_the_least() -> None:
    data = ReportData(name="x")
    assert data.to_json() == '{"name":"x"}'
    assert ReportData.from_json(data.to_json()) == data


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ReportData.model_validate({"name": "x", "scores": {"teacher": {"a": {"value": value}}}})


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        ReportData.model_validate({"name": "x", "colour": "red"})


def test_distances_of_another_model_are_refused() -> None:
    good = distances()
    with pytest.raises(ValueError, match="one row for each n"):
        type(good)(
            angular_last_LN=good.angular_last_LN[:-1],
            angular_mean_LN=good.angular_mean_LN,
            block_influence_L=good.block_influence_L,
        )


@pytest.mark.parametrize(
    ("keep", "removed", "cut"),
    [
        ((0, 1, 4, 5), (2, 3), (2, 2)),
        ((0, 2, 4, 5), (1, 3), None),
        ((0, 1, 2, 3, 4, 5), (), None),
        ((1, 2, 3, 4, 5), (0,), (0, 1)),
    ],
)
def test_the_cut_of_a_plan(keep: tuple[int, ...], removed: tuple[int, ...], cut: tuple[int, int] | None) -> None:
    plan = Plan(num_blocks=6, keep_blocks=keep)
    assert (plan.removed_blocks, plan.cut) == (removed, cut)


def test_arms_are_all_models_but_teacher_and_pruned() -> None:
    data = report_data()
    assert data.arm_names == ("sft", "sdft")
    only_losses = ReportData(name="x", loss_curves={"kd": ()}, recovery={"pruned": data.recovery["pruned"]})
    assert only_losses.arm_names == ("kd",)


def test_tuned_families_come_first() -> None:
    scores = {"teacher": {task: Estimate(0.5) for task in ("a", "b", "c", "d")}}
    recovery = {"sft": recovery_from(Estimate(0.5), {"e": Estimate(0.1)})}
    data = ReportData(name="x", scores=scores, recovery=recovery, tuned_families=("c", "b"))
    assert data.tasks == ("b", "c", "a", "d", "e")
