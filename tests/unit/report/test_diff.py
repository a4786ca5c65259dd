"""Texts side by side."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.report.toolbox.diff import side_by_side

text = st.text(alphabet="ab 1.,\n+=", max_size=40)


@given(text, text)
def test_pieces_join_to_the_texts(left: str, right: str) -> None:
    pieces = side_by_side(left, right)
    assert tuple("".join(piece.text for piece in side) for side in pieces) == (left, right)


@given(text)
def test_equal_texts_have_nothing_of_their_own(same: str) -> None:
    assert not any(piece.own for side in side_by_side(same, same) for piece in side)


def test_only_new_words_are_marked() -> None:
    left, right = side_by_side("so 8 * 2 = 16 plates.", "Times: 8 * 2 = 16.")
    assert [piece.text for piece in left if piece.own] == ["so", "plates"]
    assert [piece.text for piece in right if piece.own] == ["Times:"]


def test_marks_run_through_the_space_between_two_new_words() -> None:
    left, _ = side_by_side("we begin with 3", "3")
    assert [(piece.text, piece.own) for piece in left] == [("we begin with", True), (" 3", False)]


@pytest.mark.parametrize(
    ("left", "right"),
    [("!?" * 850, "?!!" * 560), ("The sum is 4. " * 215, "4 + 4 = 4 " * 300), ("a " * 1500, "a " * 1500)],
)
def test_texts_that_repeat_themselves_are_not_aligned_for_minutes(left: str, right: str) -> None:
    began = time.process_time()
    pieces = side_by_side(left, right)
    assert time.process_time() - began < 2
    assert ["".join(piece.text for piece in side) for side in pieces] == [left, right]
    assert not any(piece.own for side in pieces for piece in side)


def test_what_repeats_itself_less_is_still_marked() -> None:
    left, right = side_by_side("4 + 4 = 8. " * 20, "4 + 4 = 9. " * 20)
    assert {piece.text for piece in left if piece.own} == {"8"}
    assert {piece.text for piece in right if piece.own} == {"9"}
