"""Reading checkpoints, whole and damaged."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header
from tests.support import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("whole"), "llama", tied=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("sharded"), "qwen3", dtype="bfloat16", max_shard_bytes=40_000)


@pytest.fixture
def broken(sharded, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def refused(directory: Path, message: str, *, check=Checkpoint.open) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check(directory)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def edit(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_reads_what_safetensors_reads(kind, request):
    directory = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_expected()
    expected = {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.num_blocks == 4
    assert checkpoint.family.model_type == checkpoint.config["model_type"]


def test_single_file_wins_over_an_index_as_in_transformers(broken):
    tensors = {n: t for f in broken.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(tensors, broken / SINGLE_FILE)
    assert {info.file.name for info in Checkpoint.open(broken).tensors.values()} == {SINGLE_FILE}


def test_missing_directory_and_config(tmp_path):
    refused(tmp_path / "nothing", "no model directory .*nothing")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter, not a model")


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_malformed_config(broken, text):
    (broken / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(broken, "config.json")


def test_unsupported_and_incomplete_configs(broken):
    edit(broken / "config.json", architectures=["Qwen3ForTokenClassification"])
    refused(broken, "not a causal language model")
    edit(broken / "config.json", architectures=..., model_type="mamba")
    refused(broken, "unsupported architecture 'mamba'.*llama")
    edit(broken / "config.json", model_type="qwen3", num_hidden_layers=...)
    refused(broken, "num_hidden_layers is missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_only(whole, tmp_path, name):
    shutil.copy(whole / "config.json", tmp_path)
    refused(tmp_path, "no safetensors weights")
    (tmp_path / name).write_bytes(b"\x80\x04")
    refused(tmp_path, "pickle files only.*sdft import")


def test_weights_under_another_name(broken):
    (broken / INDEX_FILE).unlink()
    refused(broken, f"neither {SINGLE_FILE} nor {INDEX_FILE}")


def test_index_names_a_missing_shard(broken):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    refused(broken, f"{shard.name}, which is missing")


def test_index_and_shard_disagree(broken):
    index = json.loads((broken / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(tensor for tensor, file in index["weight_map"].items() if file == files[0])
    edit(broken / INDEX_FILE, weight_map={**index["weight_map"], name: files[1]})
    refused(broken, f"places {name} in {files[1]}")


@pytest.mark.parametrize("weight_map", [..., [], {"a": 1}])
def test_malformed_index(broken, weight_map):
    edit(broken / INDEX_FILE, weight_map=weight_map)
    refused(broken, "no weight_map")


@pytest.mark.parametrize("file", ["../config.json", "/etc/passwd", "config.json", "sub/x.safetensors"])
def test_index_cannot_point_elsewhere(broken, file):
    edit(broken / INDEX_FILE, weight_map={"model.norm.weight": file})
    refused(broken, "not a safetensors file in that directory")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated(broken, keep):
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(broken, f"{shard.name} is truncated")


def test_trailing_bytes(broken):
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)
    refused(broken, f"{shard.name} is corrupt: 8 bytes follow")


@pytest.mark.parametrize("prefix", [b"\xff" * 8, struct.pack("<Q", 10**9)])
def test_absurd_header_length(broken, prefix):
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(prefix + shard.read_bytes()[8:])
    refused(broken, f"{shard.name} is corrupt")


def _drop_first(header):
    del header[next(name for name in header if name != "__metadata__")]


def _set(**entry):
    def change(header):
        header[next(name for name in header if name != "__metadata__")].update(entry)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop_first,
        _set(dtype="Q7"),
        _set(dtype=["BF16"]),
        _set(shape=[3]),
        _set(shape=[-1, -1]),
        _set(shape="x"),
        _set(data_offsets=[0]),
        _set(data_offsets=[8, 0]),
        lambda header: [header],
        lambda header: dict.fromkeys(header, 3),
    ],
)
def test_corrupt_header(broken, change):
    shard = sorted(broken.glob("*.safetensors"))[0]
    rewrite_header(shard, change)
    refused(broken, f"{shard.name} is corrupt")


def test_header_that_is_not_json(broken):
    shard = sorted(broken.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xfe{{"
    shard.write_bytes(data)
    refused(broken, f"{shard.name} is corrupt: its header is not JSON")


def test_read_header_of_an_empty_file(tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    assert read_header(path) == {}


def check_tensors(directory: Path) -> None:
    Checkpoint.open(directory).check_tensors()


def replaced(directory: Path, **tensors: torch.Tensor | None) -> Path:
    """Change tensors of a one-file checkpoint; None removes one. `__` in a name stands for a dot."""
    content = load_file(directory / SINGLE_FILE)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        content.pop(key, None)
        if tensor is not None:
            content[key] = tensor
    save_file(content, directory / SINGLE_FILE, metadata={"format": "pt"})
    return directory


def test_missing_misshapen_and_stray_tensors(whole, tmp_path):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    replaced(copy, model__layers__2__mlp__up_proj__weight=None)
    refused(copy, "lacks the tensor model.layers.2.mlp.up_proj.weight", check=check_tensors)
    replaced(copy, model__layers__2__mlp__up_proj__weight=torch.zeros(64, 31))
    refused(copy, r"up_proj.weight has shape \[64, 31\], config.json says \[64, 32\]", check=check_tensors)
    replaced(copy, model__layers__2__mlp__up_proj__weight=torch.zeros(64, 32))
    check_tensors(copy)
    replaced(copy, model__layers__0__mlp__up_proj__weight_scale=torch.zeros(64))
    refused(copy, "up_proj.weight_scale is not a tensor of LlamaForCausalLM", check=check_tensors)


def test_more_blocks_on_disk_than_in_the_config(broken):
    edit(broken / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(broken, r"model.layers.3.*and 10 more", check=check_tensors)


def test_stored_tied_head_and_rotary_frequencies_are_harmless(tmp_path):
    directory = tiny.make_model(tmp_path, "llama")
    head = load_file(directory / SINGLE_FILE)["model.embed_tokens.weight"].clone()
    replaced(directory, lm_head__weight=head, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4))
    Checkpoint.open(directory).check_tensors()


def test_reading_needs_a_floating_dtype(tmp_path, whole):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    replaced(copy, model__norm__weight=torch.zeros(32, dtype=torch.int8))
    with pytest.raises(ModelError, match="I8"):
        Checkpoint.open(copy).read("model.norm.weight")
