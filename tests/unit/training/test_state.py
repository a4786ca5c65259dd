"""Training states on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdft_ray.errors import StoreError
from sdft_ray.training.state import TrainState, load_state, save_state

STATE = TrainState(
    step=7,
    weights={"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])},
    optimizer={"a.weight": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(7.0)}},
    identity={"seed": 3, "betas": [0.9, 0.95]},
    averages={"b": torch.tensor([0.5])},
)


def test_a_state_survives_the_disk(tmp_path: Path):
    save_state(tmp_path / "new", STATE)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".safetensors", ".json"}
    found = load_state(tmp_path / "new")
    assert (found.step, found.identity) == (STATE.step, STATE.identity)
    assert found.weights.keys() == STATE.weights.keys()
    for name, value in STATE.weights.items():
        assert torch.equal(found.weights[name], value)
    assert found.optimizer.keys() == {"a.weight"}
    for key, value in STATE.optimizer["a.weight"].items():
        assert torch.equal(found.optimizer["a.weight"][key], value)
    assert torch.equal(found.averages["b"], STATE.averages["b"])
    assert load_state(tmp_path / "new", checked=True).step == STATE.step


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
    with pytest.raises(StoreError, match="another format"):
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
