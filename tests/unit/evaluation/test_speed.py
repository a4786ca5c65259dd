"""Measured speed: models of known pace on a clock of their own, memory by formula, and sizes that cannot be.

A paced model tells the clock how long each of its forwards took, so that rates have a closed form on any machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation import speed
from sdft_ray.evaluation.rounds import ratio
from sdft_ray.evaluation.speed import ModelSpeed, measure_speed
from sdft_ray.models.loading import load_model
from sdft_ray.models.size import size_of
from tests.support.tiny import make_model

STEP_S, TOKEN_S = 0.5, 0.125
"""A forward of a paced model takes so long, and so much more for every token in it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {f"b{count}": make_model(root / f"b{count}", num_blocks=count) for count in (16, 1)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", num_blocks=2)


class Paced:
    """Loads one model as `slow` and as `fast`, which takes a quarter of the time. `seen`: (model, rows) in turn."""

    def __init__(self, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slowness = 0.0, 1.0
        self.seen: list[tuple[str, int]] = []
        self._model_dir = model_dir
        monkeypatch.setattr(speed, "load_model", self._load)
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def _load(self, name: Path, dtype: str) -> Any:
        model = load_model(self._model_dir, dtype)

        def take_time(_: Any, args: Any, given: dict[str, Any]) -> None:
            ids_BT = given["input_ids"]
            if ids_BT.shape[1] > 1:
                self.seen.append((name.name, len(ids_BT)))
            pace = (1.0 if name.name == "slow" else 0.25) * self.slowness
            self.now += pace * (STEP_S + TOKEN_S * ids_BT.numel())

        model.register_forward_pre_hook(take_time, with_kwargs=True)
        return model

    def measure(self, **asked: Any) -> dict[str, ModelSpeed]:
        return measure_speed(
            {"slow": "slow", "fast": "fast"}, batch_rows=(1, 3), prompt_tokens=4, new_tokens=5, **asked
        )


def test_models_of_known_pace(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Paced(tiny, monkeypatch).measure(rounds=2)
    assert list(found) == ["slow", "fast"]
    for name, pace in (("slow", 1.0), ("fast", 0.25)):
        assert [batch.batch_rows for batch in found[name].batches] == [1, 3]
        for batch in found[name].batches:
            rows = batch.batch_rows
            prefill_s = pace * (STEP_S + 4 * rows * TOKEN_S)
            assert batch.first_token_s.rounds == pytest.approx([prefill_s] * 2)
            assert batch.prefill.rounds == pytest.approx([4 * rows / prefill_s] * 2)
            # Four steps bring four tokens a row, so a step's time is what counts.
            assert batch.decode.rounds == pytest.approx([rows / (pace * (STEP_S + rows * TOKEN_S))] * 2)
    for slow, fast in zip(found["slow"].batches, found["fast"].batches, strict=True):
        assert ratio(fast.decode, slow.decode).median == pytest.approx(4)
        assert ratio(slow.first_token_s, fast.first_token_s).median == pytest.approx(4)


def test_a_machine_that_slows_down_changes_rates_and_no_ratio(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paced = Paced(tiny, monkeypatch)

    def slow_down(done: int, _: int) -> None:
        paced.slowness = (1.0, 3.0, 0.5, 7.0)[done]

    found = paced.measure(rounds=3, on_round=slow_down)
    slow, fast = (found[name].batches[0].decode for name in ("slow", "fast"))
    own = 1 / (STEP_S + TOKEN_S)
    assert slow.rounds == pytest.approx([own, own / 3, own / 0.5])
    assert slow.median == pytest.approx(own)
    assert ratio(fast, slow).rounds == pytest.approx([4, 4, 4])


def test_turns_change_with_the_round_and_the_first_round_does_not_count(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced = Paced(tiny, monkeypatch)
    told: list[tuple[int, int]] = []
    found = paced.measure(rounds=3, on_round=lambda done, total: told.append((done, total)))
    one_way, other_way = (
        [(name, rows) for rows in (1, 3) for name in names] for names in (("slow", "fast"), ("fast", "slow"))
    )
    assert paced.seen == one_way + other_way + one_way + other_way
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert len(found["fast"].batches[1].decode.rounds) == 3


def test_a_shallow_model_is_faster(models: dict[str, Path]) -> None:
    speeds = measure_speed(models, batch_rows=(2,), prompt_tokens=8, new_tokens=6, rounds=5)
    deep, shallow = (speeds[name].batches[0] for name in ("b16", "b1"))
    # Sixteen times the blocks: a factor of two is far inside what any machine shows.
    assert ratio(shallow.decode, deep.decode).median > 2
    assert ratio(shallow.prefill, deep.prefill).median > 2
    assert ratio(deep.first_token_s, shallow.first_token_s).median > 2
    assert deep.decode.low <= deep.decode.median <= deep.decode.high


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_that_sizes_promise(models: dict[str, Path], dtype: str) -> None:
    found = measure_speed(models, batch_rows=(3, 1), prompt_tokens=7, new_tokens=5, rounds=1, dtype=dtype)
    for name, model_dir in models.items():
        size = size_of(json.loads((model_dir / "config.json").read_text(encoding="utf-8")), dtype=dtype)
        assert found[name].weight_bytes == size.weight_bytes
        assert {batch.batch_rows: batch.kv_bytes for batch in found[name].batches} == {
            rows: size.kv_bytes_per_token * rows * (7 + 5 - 1) for rows in (3, 1)
        }
        assert [batch.peak_bytes for batch in found[name].batches] == [None, None]


def test_blocks_with_a_window_hold_no_more_than_it(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "gemma", "gemma2", num_blocks=4)
    config = load_model(model_dir, "float32").config.get_text_config()
    (found,) = measure_speed({"it": model_dir}, batch_rows=(2,), prompt_tokens=20, new_tokens=3, rounds=1).values()
    tokens = {"sliding_attention": config.sliding_window - 1, "full_attention": 20 + 3 - 1}
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4
    assert set(config.layer_types) == set(tokens)
    assert found.batches[0].kv_bytes == 2 * per_token * sum(tokens[kind] for kind in config.layer_types)


def test_the_peak_is_what_came_on_top(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that held 1,000 bytes before each run, and at most so many during it."""
    peaks = iter([9_999_999, 50_000, 70_000, 60_000])  # the first round does not count
    monkeypatch.setattr(speed, "_start_counting", lambda device: 1_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    (found,) = measure_speed({"it": tiny}, batch_rows=(1,), prompt_tokens=4, new_tokens=2, rounds=3).values()
    (batch,) = found.batches
    assert batch.kv_bytes > 0
    assert batch.peak_bytes == 70_000 - 1_000 - batch.kv_bytes


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("batch_rows", (4, 0), "batch_rows is 0"),
        ("batch_rows", (), r"batch_rows is \[\]"),
        ("batch_rows", (2, 2), r"batch_rows is \[2, 2\]"),
        ("prompt_tokens", 0, "prompt_tokens is 0"),
        ("new_tokens", 1, "new_tokens is 1"),
        ("rounds", 0, "rounds is 0"),
    ],
)
def test_sizes_out_of_range_are_refused(models: dict[str, Path], field: str, value: Any, says: str) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(EvaluationError, match=says):
        measure_speed(models, **changed)


def test_a_context_that_is_too_short_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(EvaluationError, match="do not fit into the context of b16, 256"):
        measure_speed(models, prompt_tokens=250, new_tokens=7)
