"""Merging: geometry by closed forms, checkpoints by transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.loading import load_model
from sdft_ray.training.merge import linear, merge_checkpoints, slerp
from tests.support.tiny import make_model


def test_slerp_walks_the_circle() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = t * math.pi / 2
        expected = torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(east, north, t), expected)


def test_slerp_takes_the_angle_of_directions_and_mixes_the_tensors_themselves() -> None:
    """Written out: sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b with the angle w between a and b."""
    torch.manual_seed(1)
    a, b = torch.randn(7, 5), 4 * torch.randn(7, 5)
    angle = math.acos(float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)))
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(slerp(a, b, 0.3), expected)


@pytest.mark.parametrize("factor", [1.0001, 3.0, 0.0, -2.0])
def test_slerp_is_straight_where_the_arc_is_not_defined(factor: float) -> None:
    a = torch.randn(9)
    torch.testing.assert_close(slerp(a, factor * a, 0.4), linear(a, factor * a, 0.4))


@pytest.fixture
def students(tmp_path: Path) -> tuple[Path, Path]:
    shape: dict[str, Any] = {"num_blocks": 2, "dtype": "bfloat16", "tied": False}
    first = make_model(tmp_path / "first", seed=0, max_shard_bytes=20_000, **shape)
    return first, make_model(tmp_path / "second", seed=1, **shape)


@pytest.mark.parametrize("kind", ["slerp", "linear"])
def test_a_merged_checkpoint_is_a_model(students: tuple[Path, Path], tmp_path: Path, kind: Any) -> None:
    first, second = (load_model(path, "bfloat16") for path in students)
    for t in (0.0, 0.5, 1.0):
        merge_checkpoints(*students, tmp_path / f"{kind}-{t}", t, kind)
    start, middle, end = (load_model(tmp_path / f"{kind}-{t}", "bfloat16") for t in (0.0, 0.5, 1.0))
    way = {"slerp": slerp, "linear": linear}[kind]
    for name, weight in middle.state_dict().items():
        a, b = first.state_dict()[name], second.state_dict()[name]
        assert torch.equal(start.state_dict()[name], a)
        assert torch.equal(end.state_dict()[name], b)
        assert torch.equal(weight, way(a, b, 0.5).to(torch.bfloat16)), name


def test_models_that_do_not_match_are_refused(students: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", num_blocks=3, dtype="bfloat16", tied=False)
    with pytest.raises(ModelError, match=r"num_hidden_layers is 2 in one and 3 in the other"):
        merge_checkpoints(students[0], other, tmp_path / "merged", 0.5)
    tokenizer = students[1] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|user|>", "<|human|>"))
    with pytest.raises(ModelError, match=r"different tokenizers: tokenizer\.json differs"):
        merge_checkpoints(*students, tmp_path / "merged", 0.5)
    assert not (tmp_path / "merged").exists()
