"""Nested parts of a set: the same rows whatever the order, larger ones around smaller ones, chosen like any others."""

from __future__ import annotations

import itertools
import random

import pytest

from sdft_ray.data.held_out import is_held_out
from sdft_ray.data.subset import nested_subset
from sdft_ray.errors import DataError

IDS = [f"row-{number}" for number in range(2000)]


def test_larger_parts_contain_smaller_ones_in_any_order() -> None:
    shuffled = random.Random(1).sample(IDS, len(IDS))
    parts = [nested_subset(IDS, count) for count in (1, 125, 700, 1999, 2000)]
    assert [len(part) for part in parts] == [1, 125, 700, 1999, 2000]
    for smaller, larger in itertools.pairwise(parts):
        assert smaller < larger
    assert nested_subset(shuffled, 700) == parts[2]


def test_rows_of_all_places_and_of_both_sides_of_the_split_are_drawn_alike() -> None:
    chosen = nested_subset(IDS, 500)
    first_half = sum(name in chosen for name in IDS[:1000])
    assert 200 < first_half < 300  # six standard deviations of drawing 500 of 2000
    held_out = [name for name in IDS if is_held_out(name, 0.5)]
    share = sum(name in chosen for name in held_out) / len(held_out)
    assert share == pytest.approx(0.25, abs=0.06)


def test_more_rows_than_there_are() -> None:
    with pytest.raises(DataError, match=r"num_rows of an arm is 2,001, but there are 2,000"):
        nested_subset(IDS, 2001)
