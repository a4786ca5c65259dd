"""What a few rows say of templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sdft_ray.generation.trial import Distance, TemplateTrial, is_copy, recommend, trial_of
from sdft_ray.statistics.estimate import Estimate


def row(index: int, reason: str, rewrite: str = "four apples") -> dict[str, Any]:
    return {
        "example_id": f"r{index}", "instruction": "How many?", "reference_response": "There are  4.",
        "distilled_response": rewrite, "reason": reason,
    }  # fmt: skip


def trial(name: str, marks: str) -> TemplateTrial:
    """`+` is a rewrite of its own, `=` a copy, `-` one that is not kept."""
    reasons = {"+": ("kept", "four apples"), "=": ("kept", "there are 4."), "-": ("mismatch", "five")}
    return trial_of(name, [row(i, *reasons[mark]) for i, mark in enumerate(marks)], 10.0, 5.0)


@pytest.mark.parametrize(
    ("rewrite", "expected"), [("there ARE 4.\n", True), ("There are 4", False), ("So there are 4.", False)]
)
def test_a_copy_has_the_same_words(rewrite: str, expected: bool) -> None:
    assert is_copy(rewrite, "There are  4.") is expected


def test_copies_are_kept_and_do_not_count() -> None:
    found = trial("a", "++==-")
    assert (found.num_own, found.num_copies, found.reasons) == (2, 2, {"kept": 4, "mismatch": 1})
    assert found.own.value == 0.4
    assert found.length == 4 / 6
    assert [example.example_id for example in found.kept] == ["r0", "r1"]
    assert [example.reason for example in found.others] == ["copy", "copy", "mismatch"]


def test_the_template_that_keeps_most_is_recommended_with_a_test_of_the_same_rows() -> None:
    few, many = trial("few", "--------++"), trial("many", "++++++++++")
    found = recommend([few, many], "few")
    assert (found.template, found.alike) == ("many", ())
    assert found.p_value == pytest.approx(2 * 0.5**8)


def test_a_difference_that_chance_makes_is_said_to_be_one() -> None:
    found = recommend([trial("few", "--++++"), trial("many", "+-++++")], "few")
    assert (found.template, found.p_value, found.alike) == ("many", 1.0, ("few",))


def test_among_equals_the_recipes_comes_first_and_then_the_nearest() -> None:
    first, second = trial("first", "+-"), trial("second", "-+")
    assert recommend([first, second], "second").template == "second"
    assert recommend([first, second], "second").p_value is None
    near = Distance(1, Estimate(2.0), Estimate(1.0), Estimate(1.0))
    assert recommend([first, replace(second, distance=near), trial("third", "--")], "third").template == "second"
