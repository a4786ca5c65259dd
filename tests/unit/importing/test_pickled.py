"""Folders with pytorch_model.bin: the same weights as safetensors, and nothing in the file is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sdft_ray.errors import ModelError
from sdft_ray.importing.importer import import_model
from sdft_ray.models.loading import load_model
from tests.support.tiny import build_model
from tests.unit.importing.old_folders import pickled


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_bit_is_kept(shards: int, tied: bool, tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", shards=shards, tied=tied)
    (source / "LICENSE").write_text("Apache License Version 2.0")
    (source / "README.md").write_text("The card of the source.")
    (source / "optimizer.pt").write_bytes(b"x")
    done = import_model(source, tmp_path / "new")
    assert (done.kind, done.dtype) == ("PyTorch pickles", "bfloat16")
    expected, back = build_model(dtype="bfloat16", tied=tied).state_dict(), load_model(tmp_path / "new", "auto")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert done.notes == ("left out: optimizer.pt",)
    assert (tmp_path / "new" / "README.source.md").read_text() == "The card of the source."
    assert "`apache-2.0`, according to the file LICENSE" in (tmp_path / "new" / "README.md").read_text()
    assert not list((tmp_path / "new").glob("*.bin*"))
    ids = [
        AutoTokenizer.from_pretrained(folder)("Tom has 12 apples.")["input_ids"]
        for folder in (source, tmp_path / "new")
    ]
    assert ids[0] == ids[1]


def test_what_float32_cannot_hold_is_told(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", dtype="float64")
    done = import_model(source, tmp_path / "new")
    assert (done.dtype, done.notes) == ("float32", ("weights in float64 were rounded to float32",))


def test_a_tokenizer_that_cannot_be_loaded_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "NoSuchTokenizer"}))
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    steps: list[str] = []
    with pytest.raises(ModelError, match="tokenizer"):
        import_model(source, tmp_path / "new", tell=steps.append)
    assert len(steps) == 1


def test_the_dtype_is_that_of_the_weights_whatever_the_config_says(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", dtype="float32")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert import_model(source, tmp_path / "new").dtype == "float32"


def test_a_generation_config_is_kept_and_completed(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old")
    original = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 5}
    (source / "generation_config.json").write_text(json.dumps(original))
    import_model(source, tmp_path / "new")
    written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {name: written[name] for name in ("temperature", "top_p", "do_sample")} == {
        "temperature": 0.6, "top_p": 0.9, "do_sample": False,
    }  # fmt: skip
    assert written["eos_token_id"] == [5, 2], "the template ends a turn with 2"


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


BAD: dict[str, Any] = {
    "malicious": (lambda file: torch.save({"model.norm.weight": Malicious()}, file), r"other than tensors \(posix"),
    "plain pickle": (lambda file: file.write_bytes(pickle.dumps(Malicious())), "other than tensors"),
    "a whole model": (lambda file: torch.save(torch.nn.Linear(2, 2), file), r"other than tensors \(torch.nn"),
    "a trainer's": (lambda file: torch.save({"state_dict": {}, "epoch": 3}, file), "entry 'state_dict' is no tensor"),
    "a list": (lambda file: torch.save([torch.zeros(2)], file), "is no state dict but list"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:4000]), "truncated or no PyTorch file"),
    "empty": (lambda file: file.write_bytes(b""), "truncated or no PyTorch file"),
    "text": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "other than tensors"),
    "quantized": (lambda file: torch.save({"model.norm.weight": torch.zeros(2, dtype=torch.int8)}, file), "dtype int8"),
    "a tensor less": (
        lambda file: torch.save({k: v for k, v in torch.load(file).items() if "norm" not in k}, file),
        "lacks the tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_state_dict_is_refused_and_not_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = pickled(tmp_path / "old")
    spoil, message = BAD[case]
    spoil(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        import_model(source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"], "nothing was run, nothing is left"


def test_a_missing_shard_and_a_missing_tokenizer_are_named(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", shards=2)
    shard = source / "pytorch_model-00002-of-00002.bin"
    shutil.move(shard, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=shard.name):
        import_model(source, tmp_path / "new")
    shutil.move(tmp_path / "elsewhere", shard)
    shutil.move(source / "pytorch_model.bin.index.json", tmp_path / "index")
    with pytest.raises(ModelError, match="holds shards without"):
        import_model(source, tmp_path / "new")
    shutil.move(tmp_path / "index", source / "pytorch_model.bin.index.json")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        import_model(source, tmp_path / "new")
