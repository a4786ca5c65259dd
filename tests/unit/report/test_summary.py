"""Means over families, and the verdict in words."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest

from sdft_ray.report.run.model import BestVsNext, Decontamination, ReportData, Retention, Truncation
from sdft_ray.report.run.words import comparison, groups, mean_score, overlap, ranked_arms, verdict, warnings
from sdft_ray.report.toolbox.numbers import THIN
from sdft_ray.statistics.estimate import Estimate, Interval
from tests.unit.report.made_up import FAMILIES, SCORES, TUNED, report_data, stderr


def said(data: ReportData) -> str:
    return "".join(part.text for part in verdict(data)).replace(THIN, " ")


def with_means(**means: tuple[float | None, float | None]) -> ReportData:
    data = report_data()
    changed = {
        name: dataclasses.replace(data.recovery["sft"], mean=Estimate(value, error))
        for name, (value, error) in means.items()
    }
    return data.model_copy(update={"recovery": changed})


def test_mean_score_is_the_plain_mean_with_the_error_of_independent_tasks() -> None:
    score = mean_score(report_data(), "sdft", TUNED)
    values = SCORES["sdft"][:3]
    assert score is not None
    assert score.value == pytest.approx(statistics.fmean(values))
    assert score.stderr == pytest.approx(math.sqrt(sum(stderr(value, 200) ** 2 for value in values)) / 3)


def test_no_mean_where_a_task_is_missing() -> None:
    data = report_data()
    assert mean_score(data, "sdft", (*FAMILIES, "unknown")) is None
    assert mean_score(data, "nobody", FAMILIES) is None
    assert mean_score(data, "sdft", ()) is None


def test_a_mean_without_errors_has_none() -> None:
    data = ReportData(name="x", scores={"teacher": {"a": Estimate(0.5), "b": Estimate(1.0, 0.1)}})
    assert mean_score(data, "teacher", ("a", "b")) == Estimate(0.75)


def test_groups_stand_apart_only_when_there_are_two() -> None:
    data = report_data()
    assert [(group.name, group.tasks) for group in groups(data)] == [
        ("Tuned families", TUNED),
        ("Off-domain", FAMILIES[3:]),
    ]
    for tuned in ((), FAMILIES):
        (group,) = groups(data.model_copy(update={"tuned_families": tuned}))
        assert (group.name, group.tasks) == ("", FAMILIES)


def test_verdict_names_size_and_every_recovery_with_its_error() -> None:
    assert said(report_data()) == (
        "With 31.1 % fewer parameters, sdft recovers 92.3 ± 0.9 % of the teacher’s mean score, sft 74.6 ± 1.2 % "
        "and the untuned pruned model 67.2 ± 1.0 %."
    )


def test_verdict_of_one_arm_without_sizes_or_errors() -> None:
    data = with_means(sft=(0.5, None)).model_copy(update={"sizes": None, "scores": {}, "arms": {}, "loss_curves": {}})
    assert said(data) == "sft recovers 50.0 % of the teacher’s mean score."


def test_verdict_without_students() -> None:
    sized = report_data().model_copy(update={"recovery": {}})
    assert said(sized) == "31.1 % fewer parameters; no student was evaluated."
    assert said(ReportData(name="x")) == "No student was evaluated."


def test_arms_without_a_recovery_are_not_ranked() -> None:
    data = with_means(sft=(None, None), sdft=(0.4, 0.1))
    assert ranked_arms(data) == [("sdft", Estimate(0.4, 0.1))]


def with_lead(value: float, low: float | None, high: float | None) -> ReportData:
    lead = BestVsNext(best="sdft", next_best="sft", difference=Interval(value, low, high))
    return ReportData(name="x", retention=Retention(lead=lead))


def test_a_lead_whose_interval_is_above_zero_is_a_lead() -> None:
    text = comparison(with_lead(0.12, 0.02, 0.21).retention.lead)
    assert text == "sdft is ahead of sft by 12.0 points (+2.0 to +21.0) of the mean score."


def test_a_smaller_lead_is_none() -> None:
    text = comparison(with_lead(0.08, -0.02, 0.18).retention.lead)
    assert text == "sdft and sft cannot be told apart: their mean scores differ by 8.0 points (−2.0 to +18.0)."


def test_nothing_is_compared_without_items_or_rivals() -> None:
    assert comparison(with_lead(0.08, None, None).retention.lead) == ""
    assert comparison(None) == ""


def test_a_student_that_cannot_be_compared_is_a_warning() -> None:
    data = ReportData(name="x", retention=Retention(incomparable={"sft": "one is of lm-eval 1, the other of 2"}))
    assert warnings(data) == ["What sft kept cannot be told: one is of lm-eval 1, the other of 2."]


@pytest.mark.parametrize(
    ("num", "tokens", "said"),
    [
        (12, 256, "12 requests lost the beginning of their prompt: the context of 256 tokens is too short."),
        (1, None, "1 request lost the beginning of its prompt: the context is too short."),
    ],
)
def test_a_prompt_that_lost_its_beginning_is_a_warning(num: int, tokens: int | None, said: str) -> None:
    found = Truncation(tasks={"lab_facts": num}, context_tokens=tokens)
    assert warnings(ReportData(name="x", truncation=found)) == [f"lab_facts: {said}"]


def test_a_gate_that_fails_is_a_warning() -> None:
    data = report_data()
    assert warnings(data) == []
    failed = data.gates[3].model_copy(update={"passed": False})
    (warning,) = warnings(data.model_copy(update={"gates": (data.gates[0], failed)}))
    assert "levels" in warning


@pytest.mark.parametrize(
    ("ngram", "num", "sentence"),
    [
        (13, 12, "12 of 7,473 seed rows share 13 words in a row with one of the 1,319 test questions, or hold a "
         "shorter one whole, and were left out."),
        (8, 1, "1 of 7,473 seed rows shares 8 words in a row with one of the 1,319 test questions, or holds a shorter "
         "one whole, and was left out."),
        (13, 0, "0 of 7,473 seed rows share 13 words in a row with one of the 1,319 test questions, or hold a shorter "
         "one whole."),
        (0, 0, "The 7,473 seed rows were not compared with the test questions."),
    ],
)  # fmt: skip
def test_overlap_is_said_even_where_there_is_none(ngram: int, num: int, sentence: str) -> None:
    found = Decontamination(ngram=ngram, num_rows=7473, num_questions=1319, num_contaminated=num)
    assert overlap(ReportData(name="x", decontamination=found)) == sentence


def test_nothing_is_said_of_overlap_where_nothing_is_known() -> None:
    assert overlap(ReportData(name="x")) == ""


def test_few_kept_rewrites_are_a_warning() -> None:
    (warning,) = warnings(ReportData(name="x", selection={"kept": 12, "mismatch": 988}))
    assert warning.startswith("Selection kept 12 of 1,000 rewrites")
    assert warnings(ReportData(name="x", selection={"kept": 500, "mismatch": 500})) == []
    assert warnings(ReportData(name="x")) == []
