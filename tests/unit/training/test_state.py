"""Training states on disk: whole, and in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdft_ray.errors import StoreError
from sdft_ray.training.shards import Shard, rows_of
from sdft_ray.training.state import TrainState, load_state, save_state, shard_of

STATE = TrainState(
    step=7,
    weights={"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])},
    optimizer={"a.weight": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(7.0)}},
    identity={"seed": 3, "betas": [0.9, 0.95]},
    averages={"b": torch.tensor([0.5])},
)
TALL = TrainState(
    step=3,
    weights={"a.weight": torch.arange(14.0).reshape(7, 2), "b": torch.arange(5.0), "one": torch.ones(1)},
    optimizer={
        "a.weight": {"exp_avg": -torch.arange(14.0).reshape(7, 2), "step": torch.tensor(3.0)},
        "one": {"exp_avg": torch.tensor([4.0]), "step": torch.tensor(3.0)},
    },
    identity={"seed": 3},
    averages={"a.weight": torch.arange(14.0).reshape(7, 2) / 2, "one": torch.tensor([0.5])},
)
SHAPES = {name: tuple(value.shape) for name, value in TALL.weights.items()}


def assert_equal(found: TrainState, expected: TrainState) -> None:
    assert (found.step, found.identity, found.part) == (expected.step, expected.identity, expected.part)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value)
    assert found.averages.keys() == expected.averages.keys()
    for name, value in expected.averages.items():
        assert torch.equal(found.averages[name], value)
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, kept in expected.optimizer.items():
        assert found.optimizer[name].keys() == kept.keys()
        assert all(torch.equal(found.optimizer[name][key], value) for key, value in kept.items())


def save_pieces(directory: Path, world_size: int) -> None:
    for rank in range(world_size):
        save_state(directory, shard_of(TALL, Shard(rank, world_size, SHAPES)))


def test_a_state_survives_the_disk(tmp_path: Path):
    save_state(tmp_path / "new", STATE)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".safetensors", ".json"}
    assert_equal(load_state(tmp_path / "new"), STATE)
    assert_equal(load_state(tmp_path / "new", checked=True), STATE)


def test_one_flipped_bit_is_found(tmp_path: Path):
    save_state(tmp_path, STATE)
    content = bytearray((tmp_path / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        load_state(tmp_path)


def test_a_state_of_another_format_is_refused(tmp_path: Path):
    save_state(tmp_path, STATE)
    path = tmp_path / "state.json"
    path.write_text(path.read_text().replace('"format": ', '"format": 9'))
    with pytest.raises(StoreError, match="an unknown format"):
        load_state(tmp_path)


@pytest.mark.parametrize("damage", ["state.json", "state.safetensors"])
def test_an_incomplete_state_is_refused(tmp_path: Path, damage: str):
    save_state(tmp_path, STATE)
    (tmp_path / damage).write_bytes(b"{")
    with pytest.raises(StoreError, match=r"cannot be read|is damaged"):
        load_state(tmp_path)
    (tmp_path / damage).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_are_cut_as_torch_cuts_them(num_rows: int, world_size: int):
    values = torch.arange(num_rows)
    chunks = list(values.chunk(world_size)) + [values[:0]] * world_size
    for rank in range(world_size):
        assert torch.equal(values[rows_of(num_rows, rank, world_size)], chunks[rank])


@pytest.mark.parametrize("writers", [1, 2, 3, 9])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int):
    """With nine, the last hold nothing of any tensor."""
    save_pieces(tmp_path, writers)
    assert len(list(tmp_path.iterdir())) == 2 * writers
    for rank in range(readers):
        expected = TALL if readers == 1 else shard_of(TALL, Shard(rank, readers, SHAPES))
        assert_equal(load_state(tmp_path, rank=rank, world_size=readers), expected)


def test_a_part_is_taken_only_by_its_process():
    part = shard_of(TALL, Shard(1, 2, SHAPES))
    assert shard_of(part, Shard(1, 2, SHAPES)) is part
    for other in (Shard(0, 2, SHAPES), Shard(1, 3, SHAPES), Shard(1, 2, {**SHAPES, "b": (6,)})):
        with pytest.raises(StoreError, match="another process or model"):
            shard_of(part, other)


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index)
    path.write_text(json.dumps(index), encoding="utf-8")


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no index of the last": ("state-00003-of-00003.json", Path.unlink),
    "no index of the first": ("state-00001-of-00003.json", Path.unlink),
    "no tensors": ("state-00002-of-00003.safetensors", Path.unlink),
    "short tensors": ("state-00002-of-00003.safetensors", _shorten),
    "no JSON": ("state-00002-of-00003.json", lambda path: path.write_text("{")),
    "another step": ("state-00002-of-00003.json", lambda path: _edit(path, lambda index: index.update(step=4))),
    "rows missing in the middle": (
        "state-00002-of-00003.json",
        lambda path: _edit(path, lambda index: index["slices"]["weights|b"].update(offset=3)),
    ),
    "rows missing at the end": (
        "state-00003-of-00003.json",
        lambda path: _edit(path, lambda index: index["slices"]["weights|b"].update(shape=[6])),
    ),
    "two states": ("state.json", lambda path: path.write_text("{}")),
    "two world sizes": ("state-00001-of-00004.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_that_do_not_make_a_whole_are_refused(tmp_path: Path, damage: str, rank: int):
    """By every reader, also one whose own rows are all there."""
    save_pieces(tmp_path, 3)
    assert load_state(tmp_path, rank=rank, world_size=2).step == TALL.step
    name, spoil = DAMAGES[damage]
    spoil(tmp_path / name)
    with pytest.raises(StoreError, match=r"cannot be read|is damaged"):
        load_state(tmp_path, rank=rank, world_size=2)
