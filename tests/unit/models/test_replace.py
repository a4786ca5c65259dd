"""Tensors put in the place of others: every other byte stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.replace import write_with
from tests.support import tiny

NAMES = ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 2**30])
def test_only_the_named_tensors_change(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    source = Checkpoint.open(tiny.make_model(tmp_path / "s", dtype=dtype, max_shard_bytes=30_000, tied=False))
    config = (tmp_path / "s" / "config.json").read_text()
    new = {
        NAMES[0]: torch.randn(64, 32, dtype=torch.float64).T,  # not contiguous
        NAMES[1]: torch.randn(32),
    }
    write_with(source.directory, tmp_path / "t", new, max_shard_bytes=max_shard_bytes)
    written = Checkpoint.open(tmp_path / "t")
    written.check_expected()
    assert written.config == source.config
    assert written.tensors.keys() == source.tensors.keys()
    for name in source.tensors:
        expected = new[name].to(getattr(torch, dtype)) if name in new else source.read(name)
        assert torch.equal(written.read(name), expected), name
    assert (tmp_path / "t" / "tokenizer.json").is_file()
    assert (tmp_path / "s" / "config.json").read_text() == config


def test_a_checkpoint_is_not_written_over_itself(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="write the pruned model to another directory"):
        write_with(source, source, {})
    assert (source / "model.safetensors").read_bytes() == before


def test_a_tensor_of_another_model_is_our_mistake(tmp_path: Path) -> None:
    source = tiny.make_model(tmp_path / "s")
    with pytest.raises(AssertionError, match="has no tensor model\\.layers\\.9"):
        write_with(source, tmp_path / "t", {"model.layers.9.mlp.down_proj.weight": torch.zeros(32, 64)})
    with pytest.raises(AssertionError, match="has another shape"):
        write_with(source, tmp_path / "t", {NAMES[0]: torch.zeros(64, 32)})
    assert not (tmp_path / "t").exists()
