"""Which checkpoint a training goes on from, when files were damaged: the functions that read them, without Ray."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdft_ray.stages import checkpoints
from sdft_ray.store import files
from sdft_ray.training.state import TrainState, save_state
from tests.support.training_job import light, training_job

LIST = "checkpoint_manager_snapshot.json"
OLDER, NEWER = "checkpoint_2026-11-28_10-00-01.000001", "checkpoint_2026-11-28_10-00-02.000002"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two whole checkpoints, of steps 1 and 2, and Ray's list of them."""
    run = tmp_path / checkpoints.RUN_NAME
    for step, name in enumerate((OLDER, NEWER), 1):
        directory = run / name
        save_state(directory, TrainState(step, {"w": torch.full((4,), float(step))}, {}, {"seed": 3}))
        lines = [json.dumps({"step": number}) + "\n" for number in range(1, step + 1)]
        (directory / files.HISTORY).write_text("".join(lines), encoding="utf-8")
    results = [{"checkpoint_dir_name": name} for name in (OLDER, NEWER)]
    (run / LIST).write_text(json.dumps({"checkpoint_results": results}), encoding="utf-8")
    return run


def _newest(run: Path) -> tuple[str | None, tuple[str, ...]]:
    checkpoints.repair_checkpoint_index(str(run.parent))
    return checkpoints._newest_whole(f"file://{run.parent}")


def test_the_newest_is_taken_where_all_are_whole(run: Path) -> None:
    place, damaged = _newest(run)
    assert place == f"file://{run / NEWER}"
    assert damaged == ()
    assert (run / LIST).exists()


def test_without_any_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert _newest(tmp_path / checkpoints.RUN_NAME) == (None, ())


def _flip_a_bit(newest: Path) -> None:
    tensors = newest / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 4
    tensors.write_bytes(content)


def _shorten_history(newest: Path) -> None:
    (newest / files.HISTORY).write_text('{"step": 1}\n', encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (_flip_a_bit, "damaged"),
    "no tensors": (lambda newest: (newest / "state.safetensors").unlink(), "cannot be read"),
    "cut tensors": (lambda newest: (newest / "state.safetensors").write_bytes(b"cut"), "damaged"),
    "no index": (lambda newest: (newest / "state.json").unlink(), "cannot be read"),
    "no history": (lambda newest: (newest / files.HISTORY).unlink(), "its history cannot be read"),
    "torn history": (lambda newest: os.truncate(newest / files.HISTORY, 20), "its history cannot be read"),
    "short history": (_shorten_history, "its history does not have 2 steps"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(run / NEWER)
    place, (note,) = _newest(run)
    assert place == f"file://{run / OLDER}"
    assert note.startswith(f"{NEWER}: ")
    assert message in note


def test_where_none_is_whole_each_is_named(run: Path) -> None:
    for name in (OLDER, NEWER):
        _flip_a_bit(run / name)
    place, damaged = _newest(run)
    assert place is None
    assert [note.partition(":")[0] for note in damaged] == [NEWER, OLDER]


@pytest.mark.parametrize("num_bytes", [0, 40])
def test_a_list_that_was_cut_short_is_removed_and_costs_nothing(run: Path, num_bytes: int) -> None:
    os.truncate(run / LIST, num_bytes)
    place, damaged = _newest(run)
    assert not (run / LIST).exists()
    assert (place, damaged) == (f"file://{run / NEWER}", ())


def test_a_list_that_names_what_is_gone_is_removed(run: Path) -> None:
    (run / NEWER).rename(run.parent / "elsewhere")
    place, damaged = _newest(run)
    assert not (run / LIST).exists()
    assert (place, damaged) == (f"file://{run / OLDER}", ())


def test_a_checkpoint_that_could_not_be_copied_is_given_up_before(tmp_path: Path) -> None:
    """A real small disk: what is written takes more than half of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("making a small disk needs the right to mount one")
    try:
        job = replace(training_job(tmp_path / "inputs", light()), store_url=str(disk / "store"))
        written = disk / "saving"
        written.mkdir()
        (written / "state.safetensors").write_bytes(bytes(400_000))
        checkpoints._check_room(job, written)
        (written / "more").write_bytes(bytes(200_000))
        with pytest.raises(OSError, match="No space left on device") as raised:
            checkpoints._check_room(job, written)
        assert checkpoints._is_full(raised.value)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
