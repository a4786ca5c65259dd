"""How the figures of a step and of its parts become one."""

from __future__ import annotations

from sdft_ray.stages.board import Figure, merged


def test_parts_are_added_up() -> None:
    """Such as the tasks that measure a share of the batches each."""
    assert merged({"0": Figure(3, 10, "batches"), "1": Figure(4, 11, "batches")}, "") == Figure(7, 21, "batches")


def test_of_the_steps_own_count_and_that_of_its_parts_the_larger_counts() -> None:
    """Rows whose receipts have come, and rows that actors have answered; a new actor begins at 0."""
    own, reused = Figure(128, 700, "rows"), Figure(64, 0, "rows")
    assert merged({"": own, "reused": reused, "a": Figure(90, 0, "rows")}, "").done == 154
    assert merged({"": own, "reused": reused, "a": Figure(2, 0, "rows")}, "").done == 128
    assert merged({"": own, "reused": reused, "a": Figure(700, 0, "rows")}, "").done == 700


def test_a_phase_goes_with_what_was_counted_before() -> None:
    assert merged({"": Figure(9, 9, "steps")}, "writing the student") == Figure(9, 9, "steps", "writing the student")
    assert merged({}, "loading the model") == Figure(0, 0, "", "loading the model")
