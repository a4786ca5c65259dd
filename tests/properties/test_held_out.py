"""Rows are held out by their ids alone: whatever the order, the size or the other columns of the set."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.data.held_out import held_out_mask, is_held_out, part
from sdft_ray.errors import DataError

fractions = st.floats(0, 0.5)


def held(names: list[str], fraction: float) -> set[str]:
    table = pa.table({"example_id": pa.array(names, pa.string())})
    return {name for name, out in zip(names, held_out_mask(table, fraction).tolist(), strict=True) if out}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True), st.data(), fractions)
def test_growth_and_order_move_no_row(names: list[str], data: st.DataObject, fraction: float) -> None:
    few = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    assert held(few, fraction) == held(names, fraction) & set(few)


@given(st.text(), fractions, fractions)
def test_a_larger_fraction_holds_out_the_same_rows_and_more(name: str, a: float, b: float) -> None:
    assert is_held_out(name, min(a, b)) <= is_held_out(name, max(a, b))
    assert not is_held_out(name, 0.0)


@given(st.text(), st.integers(1, 99), fractions)
def test_turns_of_a_conversation_are_on_one_side(name: str, turn: int, fraction: float) -> None:
    assert is_held_out(f"{name}#{turn}", fraction) == is_held_out(f"{name}#{turn + 1}", fraction)


@given(st.integers(0, 10**9), st.floats(0.01, 0.5))
def test_the_fraction_is_about_right(first: int, fraction: float) -> None:
    """Within six standard deviations of a fair draw of 4,000 rows, whose ids are like those that people give."""
    num_rows = 4000
    count = sum(is_held_out(f"row-{i}", fraction) for i in range(first, first + num_rows))
    assert abs(count - fraction * num_rows) <= 6 * math.sqrt(num_rows * fraction * (1 - fraction))


def test_both_parts_are_the_whole_in_its_order() -> None:
    table = pa.table({"example_id": [f"r{i}" for i in range(50)], "n": list(range(50))})
    out, rest = part(table, 0.3, held_out=True), part(table, 0.3, held_out=False)
    assert sorted(out["n"].to_pylist() + rest["n"].to_pylist()) == list(range(50))
    assert all(rows["n"].to_pylist() == sorted(rows["n"].to_pylist()) for rows in (out, rest))
    assert out["example_id"].to_pylist() == [f"r{i}" for i in range(50) if is_held_out(f"r{i}", 0.3)]
    assert part(table, 0.0, held_out=False).equals(table)


def test_a_part_without_rows_is_told() -> None:
    table = pa.table({"example_id": ["r0"]})
    with pytest.raises(DataError, match=r"none of the 1 rows is held out.*raise train.held_out"):
        part(table, 0.0, held_out=True)
    inside = pa.table({"example_id": [next(f"r{i}" for i in range(99) if is_held_out(f"r{i}", 0.5))]})
    with pytest.raises(DataError, match=r"left to train on.*lower train.held_out"):
        part(inside, 0.5, held_out=False)
