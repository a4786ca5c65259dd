"""Heads that the config ties: absent, copied, apart, alone; each as transformers takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft_ray.errors import ModelError
from sdft_ray.models.channels import Channels
from sdft_ray.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from sdft_ray.models.description import ModelDescription
from sdft_ray.models.head import load_head
from sdft_ray.models.loading import check_finite, load_model
from sdft_ray.models.size import size_of
from sdft_ray.models.surgery import drop_blocks, prune_checkpoint
from tests.support import tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model_with(directory: Path, family: str, head: str) -> Path:
    tiny.make_model(directory, family, rms_norm_eps=1e-12)
    tensors = load_file(directory / SINGLE_FILE)
    if head == "copied":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    elif head == "apart":
        tensors[HEAD] = tensors[EMBEDDING].roll(1, 0)
    elif head == "alone":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    return directory


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, "float32")(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("head", ["absent", "copied", "apart", "alone"])
def test_sizes_heads_and_surgery(family: str, head: str, tmp_path: Path) -> None:
    source = model_with(tmp_path / "s", family, head)
    checkpoint, model = Checkpoint.open(source), load_model(source, "float32")
    checkpoint.check_expected()
    apart = head == "apart"
    num_parameters = sum(p.numel() for p in model.parameters())
    assert size_of(checkpoint.config).num_parameters == num_parameters
    assert ModelDescription.of(source).size.num_parameters == num_parameters
    assert bool(checkpoint.config.get("tie_word_embeddings", True)) != apart
    any_model: Any = model
    assert torch.equal(load_head(source, "float32")[0].weight, any_model.lm_head.weight)

    drop_blocks(source, tmp_path / "t", range(4))
    torch.testing.assert_close(logits(tmp_path / "t"), logits(source), rtol=0, atol=0)
    hidden = tuple(range(0, 32, 2))
    prune_checkpoint(source, tmp_path / "narrow", [0, 2], Channels(hidden=hidden))
    check_finite(tmp_path / "narrow")
    assert size_of(Checkpoint.open(tmp_path / "narrow").config).num_parameters == sum(
        p.numel() for p in load_model(tmp_path / "narrow", "float32").parameters()
    )


def test_a_narrow_model_with_a_head_apart_computes_the_same(tmp_path: Path) -> None:
    """The last norm is scaled, as in any model whose head is its own."""
    source = model_with(tmp_path / "s", "gemma2", "apart")
    gone = list(range(1, 32, 2))
    wide: Any = load_model(source, "float32")
    with torch.no_grad():
        wide.model.embed_tokens.weight[:, gone] = 0
        for layer in wide.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
        expected = wide(input_ids=torch.arange(20)[None]).logits
    prune_checkpoint(source, tmp_path / "t", range(4), Channels(hidden=tuple(range(0, 32, 2))))
    torch.testing.assert_close(logits(tmp_path / "t"), expected, rtol=0, atol=2e-5)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    source = model_with(tmp_path / "s", "llama", "copied")
    assert Checkpoint.open(source).config["tie_word_embeddings"]
    tensors = load_file(source / SINGLE_FILE)
    tensors[HEAD][0, 0] += 1
    save_file(tensors, source / SINGLE_FILE, metadata={"format": "pt"})
    assert not Checkpoint.open(source).config["tie_word_embeddings"]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.make_model(tmp_path / "sharded", "llama", max_shard_bytes=20_000)


def placed(directory: Path, **names: str) -> None:
    """Add entries to the index."""
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    for name in names.values():
        index["weight_map"][name] = sorted(set(index["weight_map"].values()))[-1]
    (directory / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def test_an_index_with_entries_too_many(sharded: Path) -> None:
    placed(sharded, head=HEAD, rotary="model.layers.0.self_attn.rotary_emb.inv_freq")
    Checkpoint.open(sharded).check_expected()
    assert size_of(Checkpoint.open(sharded).config).num_parameters == sum(
        p.numel() for p in load_model(sharded, "float32").parameters()
    )
    placed(sharded, other="model.layers.9.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"places model\.layers\.9\.mlp\.up_proj\.weight in .*, which lacks it"):
        Checkpoint.open(sharded)


def test_an_index_that_names_a_head_which_is_nowhere_and_not_tied(tmp_path: Path) -> None:
    directory = tiny.make_model(tmp_path, "llama", max_shard_bytes=20_000, tied=False)
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    shard = directory / index["weight_map"][HEAD]
    save_file({k: v for k, v in load_file(shard).items() if k != HEAD}, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        Checkpoint.open(directory).check_tensors()


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    """transformers reads every shard that the index names, whatever it says is in which."""
    index = json.loads((sharded / INDEX_FILE).read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    wrong = {name: shards[shards.index(shard) - 1] for name, shard in index["weight_map"].items()}
    (sharded / INDEX_FILE).write_text(json.dumps({**index, "weight_map": wrong}), encoding="utf-8")
    Checkpoint.open(sharded).check_expected()
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(load_model(sharded, "float32").state_dict()[name], Checkpoint.open(sharded).read(name))
