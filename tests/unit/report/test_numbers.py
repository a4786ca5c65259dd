"""How figures are written."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.cli.render import print_explanation
from sdft_ray.pipeline.detectable import Detectable
from sdft_ray.pipeline.explain import Explanation
from sdft_ray.report.run.tables import size_table
from sdft_ray.report.toolbox import numbers
from sdft_ray.report.toolbox.numbers import THIN
from tests.unit.report.made_up import report_data


def spaced(text: str) -> str:
    return text.replace(THIN, " ")


def test_per_cent() -> None:
    assert spaced(numbers.percent(0.8973)) == "89.7 %"
    assert spaced(numbers.percent_error(0.8973, 0.0031)) == "89.7 ± 0.3 %"
    assert spaced(numbers.percent_error(0.8973, None, 0)) == "90 %"
    assert numbers.percent_error(None, 0.1) == "–"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(2, 1.5, "−25.0 %"), (1, 1.4389, "+43.9 %"), (8, 8, "0.0 %"), (1e6, 999_999, "0.0 %"), (0, 3, "–")],
)
def test_change(before: float, after: float, text: str) -> None:
    assert spaced(numbers.change(before, after)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1,234"),
        (9_999, "9,999"),
        (61_840, "61.8 k"),
        (999_999, "1.00 M"),
        (2_423_424, "2.42 M"),
        (8_030_261_248, "8.03 B"),
        (1.5e13, "15.0 T"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert spaced(numbers.count(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512 B"), (6144, "6.00 KiB"), (131_072, "128 KiB"), (16 * 2**30, "16.0 GiB"), (3 * 2**40, "3.00 TiB")],
)
def test_num_bytes(value: float, text: str) -> None:
    assert spaced(numbers.num_bytes(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "–"), (0.01, "<0.1 s"), (4.94, "4.9 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")],
)
def test_seconds(value: float, text: str) -> None:
    assert spaced(numbers.seconds(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.000_85, "0.85 ms"), (0.006_75, "6.75 ms"), (0.1234, "123 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s")],
)
def test_short_time(value: float, text: str) -> None:
    assert spaced(numbers.short_time(value)) == text


@pytest.mark.parametrize(("value", "text"), [(0.02, "0.02"), (1e-3, "1e−3"), (9.94e-4, "9.9e−4"), (0, "0")])
def test_rate(value: float, text: str) -> None:
    assert numbers.rate(value) == text


@given(st.floats(min_value=1e-9, max_value=1e12))
def test_ticks_start_at_zero_cover_the_largest_and_are_few(largest: float) -> None:
    ticks = numbers.nice_ticks(largest)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-8)
    assert ticks[-2] < largest
    assert 2 <= len(ticks) <= 6
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


def test_explain_and_the_report_write_one_number_in_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = report_data().sizes
    assert sizes is not None
    told = Detectable({"facts": 200}, True, 0.2, 0, 0.09, 0.09)
    print_explanation(Explanation((), sizes.teacher, sizes.pruned, None, told))
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    for row in size_table(report_data()).groups[0].rows[:4]:
        assert [spaced(cell.text) for cell in (row.head, *row.cells[:3])] in lines
