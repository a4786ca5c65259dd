"""The bytes and files of surgery; what the pruned model computes is tested in tests/numerics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from sdft_ray.errors import ModelError, PlanError
from sdft_ray.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from sdft_ray.models.surgery import drop_blocks
from tests.support import tiny


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source_shard_bytes", [None, 30_000])
@pytest.mark.parametrize("max_shard_bytes", [50_000, 2**30])
def test_tensors_are_kept_and_renumbered(tmp_path, dtype, source_shard_bytes, max_shard_bytes):
    source = tiny.make_model(tmp_path / "s", "qwen2", dtype=dtype, max_shard_bytes=source_shard_bytes, num_blocks=5)
    keep = [0, 2, 4]
    drop_blocks(source, tmp_path / "t", keep, max_shard_bytes=max_shard_bytes)
    expected = {}
    for name, tensor in tensors_of(source).items():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        if block is None:
            expected[name] = tensor
        elif int(block[1]) in keep:
            expected[name.replace(block[0], f"model.layers.{keep.index(int(block[1]))}.")] = tensor
    result = tensors_of(tmp_path / "t")
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) and result[name].dtype == expected[name].dtype
               for name in expected)  # fmt: skip
    Checkpoint.open(tmp_path / "t").check_expected()


def test_shards_and_index(tmp_path):
    source = tiny.make_model(tmp_path / "s", "llama", num_blocks=6)
    drop_blocks(source, tmp_path / "t", [0, 1, 4, 5], max_shard_bytes=30_000)
    index = json.loads((tmp_path / "t" / INDEX_FILE).read_text())
    files = sorted((tmp_path / "t").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    sizes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
            sizes[file.name] = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert max(sizes.values()) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_one_file_needs_no_index(tmp_path):
    source = tiny.make_model(tmp_path / "s", max_shard_bytes=30_000)
    drop_blocks(source, tmp_path / "t", [0, 1])
    assert {path.name for path in (tmp_path / "t").glob("model*")} == {SINGLE_FILE}


def test_a_tensor_larger_than_a_shard(tmp_path):
    source = tiny.make_model(tmp_path / "s")
    drop_blocks(source, tmp_path / "t", [0, 1], max_shard_bytes=1)
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == len(tensors_of(tmp_path / "t"))
    Checkpoint.open(tmp_path / "t").check_expected()


def test_keeping_all_changes_nothing(tmp_path):
    source = tiny.make_model(tmp_path / "s", "gemma3_text", dtype="bfloat16", max_shard_bytes=30_000)
    drop_blocks(source, tmp_path / "t", range(4))
    before, after = tensors_of(source), tensors_of(tmp_path / "t")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "t/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_bits_are_copied_not_values(tmp_path):
    """NaN payloads and negative zeros survive, and so do tensors of other widths."""
    narrow: dict[str, Any] = {"hidden": 34, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    source = tiny.make_model(tmp_path / "s", "llama", dtype="bfloat16", **narrow)
    content = load_file(source / SINGLE_FILE)
    odd = torch.tensor([0x7FC1, -1, -0x8000, 1], dtype=torch.int16).repeat(9)[:34].view(torch.bfloat16)
    wide = torch.linspace(0, 1, 34, dtype=torch.float64)
    content["model.layers.1.input_layernorm.weight"] = odd
    content["model.norm.weight"] = wide
    content["model.layers.1.post_attention_layernorm.weight"] = wide.clone()
    save_file(content, source / SINGLE_FILE, metadata={"format": "pt"})
    drop_blocks(source, tmp_path / "t", [1])
    result = load_file(tmp_path / "t" / SINGLE_FILE)
    assert torch.equal(result["model.layers.0.input_layernorm.weight"].view(torch.int16), odd.view(torch.int16))
    assert torch.equal(result["model.norm.weight"], wide)
    stored = Checkpoint.open(tmp_path / "t").tensors["model.norm.weight"]
    assert (stored.dtype, stored.offset % 8) == ("F64", 0)  # readers view the data in place


def test_companions(tmp_path):
    source = tiny.make_model(tmp_path / "s")
    (source / "LICENSE.txt").write_text("terms")
    (source / "README.md").write_text("about the teacher")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    drop_blocks(source, tmp_path / "t", [0, 3])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "t" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "t" / "LICENSE.txt").read_text() == "terms"
    assert (tmp_path / "t" / "additional_chat_templates" / "tools.jinja").exists()
    assert not (tmp_path / "t" / "README.md").exists()
    assert not (tmp_path / "t" / "pytorch_model.bin").exists()


def test_an_interrupted_attempt_is_replaced(tmp_path):
    source = tiny.make_model(tmp_path / "s")
    drop_blocks(source, tmp_path / "t", [0, 1, 2], max_shard_bytes=30_000)
    for path in sorted((tmp_path / "t").glob("*.safetensors"))[-2:]:
        path.write_bytes(path.read_bytes()[:100])
    drop_blocks(source, tmp_path / "t", [0, 1])
    Checkpoint.open(tmp_path / "t").check_expected()
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == 1
    assert not (tmp_path / "t" / INDEX_FILE).exists()


def test_the_source_is_left_alone(tmp_path):
    source = tiny.make_model(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    drop_blocks(source, tmp_path / "t", [0])
    with pytest.raises(ModelError, match="another directory"):
        drop_blocks(source, tmp_path / "t" / ".." / "s", [0])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_refused(tmp_path):
    source = tiny.make_model(tmp_path / "s")
    with pytest.raises(PlanError, match="no block 4"):
        drop_blocks(source, tmp_path / "t", [0, 4])
    with pytest.raises(PlanError, match="keeps no block"):
        drop_blocks(source, tmp_path / "t", [])
    content = load_file(source / SINGLE_FILE)
    content.pop("model.layers.3.mlp.up_proj.weight")
    save_file(content, source / SINGLE_FILE)
    with pytest.raises(ModelError, match="lacks the tensor"):
        drop_blocks(source, tmp_path / "t", [0, 1])
    assert not (tmp_path / "t").exists()


SLACK_BYTES = 4 * 2**20
"""Headers, the index and what Python itself allocates."""

MEASURE = """
import sys
from pathlib import Path
from typing import Any
from sdft_ray.models.surgery import drop_blocks

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

before = peak_kib()
drop_blocks(Path(sys.argv[1]), Path(sys.argv[2]), [int(b) for b in sys.argv[3].split(",")])
print((peak_kib() - before) * 1024)
"""


def make_large(directory: Path, gib: float, *, num_files: int = 4) -> tuple[int, int]:
    """A random Llama of about `gib` GiB in several files; bytes of all and of the largest tensor."""
    from sdft_ray.models.families import FAMILIES, split_block

    config = {"model_type": "llama", "vocab_size": 4_000, "hidden_size": 1024, "intermediate_size": 4096}
    config |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "dtype": "float16",
    }
    family = FAMILIES["llama"]
    outer_bytes = 2 * sum(np.prod(s) for n, s in family.tensor_shapes(config).items() if split_block(n) is None)
    block_bytes = 2 * sum(np.prod(s) for n, s in family.tensor_shapes(config).items() if split_block(n) is not None)
    config["num_hidden_layers"] = max(4, int((gib * 2**30 - outer_bytes) // block_bytes))
    shapes = family.tensor_shapes(config)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    names = list(shapes)
    weight_map = {}
    for part in range(num_files):
        file_name = f"model-{part + 1:05d}-of-{num_files:05d}.safetensors"
        chosen = names[part::num_files]
        tensors = {}
        for name in chosen:
            count = int(np.prod(shapes[name]))
            tensors[name] = np.frombuffer(generator.bytes(2 * count), np.float16).reshape(shapes[name])
        save_numpy(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file_name)
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 2 * sum(int(np.prod(s)) for s in shapes.values()), 2 * max(int(np.prod(s)) for s in shapes.values())


def grown_by(tmp_path: Path, gib: float) -> tuple[int, int, int]:
    """Peak memory that surgery added in a fresh process, bytes of the model, bytes of the largest tensor."""
    source = tmp_path / "large"
    model_bytes, largest_bytes = make_large(source, gib)
    num_blocks = Checkpoint.open(source).num_blocks
    keep = [block for block in range(num_blocks) if not num_blocks // 2 <= block < num_blocks // 2 + 2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "t"), ",".join(map(str, keep))],
        check=True,
        capture_output=True,
        text=True,
    )
    Checkpoint.open(tmp_path / "t").check_tensors()
    for directory in (source, tmp_path / "t"):  # pytest would keep gigabytes for three sessions
        shutil.rmtree(directory)
    return int(done.stdout), model_bytes, largest_bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    grown, model_bytes, largest_bytes = grown_by(tmp_path, 0.125)
    assert grown <= largest_bytes + SLACK_BYTES < model_bytes / 8


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_with_two_gib(tmp_path):
    grown, model_bytes, largest_bytes = grown_by(tmp_path, 2)
    assert model_bytes > 1.9 * 2**30
    assert grown <= largest_bytes + SLACK_BYTES
