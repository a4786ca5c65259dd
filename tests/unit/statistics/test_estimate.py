"""Values with their uncertainty as plain data, and without what is no number."""

from __future__ import annotations

import json
import math

import pytest

from sdft_ray.evaluation.forgetting import Likeness
from sdft_ray.evaluation.shift import Shift
from sdft_ray.statistics.estimate import Estimate, finite, plain


def test_artifacts_hold_value_and_standard_error_alone() -> None:
    shift = Shift(2, {"teacher": {"reference": Estimate(0.5, 0.1)}}, {"teacher": Estimate(None)})
    assert json.dumps(plain(shift)) == (
        '{"num_rows": 2, "nll": {"teacher": {"reference": {"value": 0.5, "stderr": 0.1}}}, '
        '"gaps": {"teacher": {"value": null, "stderr": null}}}'
    )
    assert plain(Likeness(0, Estimate(None), None)) == {
        "num_answers": 0, "mean": {"value": None, "stderr": None}, "low": None, "num_empty": 0, "num_cut": 0,
    }  # fmt: skip
    assert plain(Estimate(0.5, low=0.0, high=0.6, n=7)) == {
        "value": 0.5, "stderr": None, "low": 0.0, "high": 0.6, "n": 7,
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_becomes_none(value: float) -> None:
    parts = {"a": (Estimate(value, 0.1), [value, 1.0]), "b": Likeness(1, Estimate(0.5, value), value)}
    assert finite(parts) == {"a": (Estimate(None, 0.1), [None, 1.0]), "b": Likeness(1, Estimate(0.5, None), None)}


def test_a_value_that_is_not_known_cannot_be_used() -> None:
    assert Estimate(0.5).known == 0.5
    with pytest.raises(AssertionError, match="defined"):
        _ = Estimate(None).known
