"""Measured speed: what is counted, that depth shows, and sizes that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.speed import _rate, measure_speed
from tests.tiny import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {f"b{count}": make_model(root / f"b{count}", num_blocks=count) for count in (16, 1)}


def test_a_shallow_model_is_faster(models: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    speeds = measure_speed(
        models, batch_rows=2, prompt_tokens=8, new_tokens=6, rounds=5,
        on_round=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert list(speeds) == ["b16", "b1"]
    # Sixteen times the blocks: a factor of two is far inside what any machine shows.
    assert speeds["b1"].decode.median > 2 * speeds["b16"].decode.median
    assert speeds["b1"].prefill.median > 2 * speeds["b16"].prefill.median
    for speed in speeds.values():
        assert len(speed.decode.rounds) == len(speed.prefill.rounds) == 5
        assert speed.decode.low <= speed.decode.median <= speed.decode.high
    assert told == [(i, 5) for i in range(1, 6)]


def test_rates_count_tokens_over_seconds() -> None:
    rate = _rate(100, [1.0, 2.0, 4.0])
    assert rate.rounds == (100.0, 50.0, 25.0)
    assert (rate.low, rate.median, rate.high) == (37.5, 50.0, 75.0)
    assert _rate(10, [2.0]).low == _rate(10, [2.0]).high == 5.0


@pytest.mark.parametrize(
    ("field", "value"), [("batch_rows", 0), ("prompt_tokens", 0), ("new_tokens", 1), ("rounds", 0)]
)
def test_sizes_out_of_range_are_refused(models: dict[str, Path], field: str, value: int) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(EvaluationError, match=f"{field} is {value}"):
        measure_speed(models, **changed)


def test_a_context_that_is_too_short_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(EvaluationError, match="do not fit into the context of b16, 256"):
        measure_speed(models, prompt_tokens=250, new_tokens=7)
