"""Where an import writes: nothing is overwritten, and nothing half-written is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdft_ray.errors import ModelError, StoreError
from sdft_ray.importing.importer import check_room, import_model, open_source
from tests.support.tiny import make_model
from tests.unit.importing.old_folders import pickled


def test_a_folder_with_files_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    source, place = pickled(tmp_path / "old"), tmp_path / "new"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists and is not empty"):
        import_model(source, place)
    (place / "notes.txt").unlink()
    import_model(source, place)
    assert (place / "model.safetensors").is_file()
    with pytest.raises(StoreError, match="exists and is not empty"):
        import_model(source, place)
    with pytest.raises(StoreError, match="is not a folder"):
        import_model(source, place / "config.json")


def test_the_disk_must_have_room(tmp_path: Path) -> None:
    check_room(tmp_path / "new", 1)
    with pytest.raises(StoreError, match="needs 1,000,000,000,000,000,000 bytes and has"):
        check_room(tmp_path / "not" / "yet" / "there", 10**18)


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        import_model(source, tmp_path / "file" / "new")


def test_sources_of_no_kind_are_named(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            open_source(path, None)

    refused(tmp_path / "missing", "there is no")
    refused(tmp_path, "holds nothing to import")
    model = make_model(tmp_path / "model")
    refused(model, "is in safetensors already")
    refused(model / "model.safetensors", "is a part of a model folder")
    refused(model / "config.json", "is not a GGUF file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    refused(tmp_path / "two", "holds 2 GGUF files: a.gguf, b.gguf")
    with pytest.raises(ModelError, match="dtype 'int4' is not supported"):
        import_model(model, tmp_path / "new", dtype="int4")


def sdft(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "sdft_ray.cli", "import", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.slow
def test_the_command_prints_steps_result_and_notes(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old")
    (source / "trainer_state.json").write_text("{}")
    done = sdft("old", "new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[:2] == ["checking old ...", "reading the weights of PyTorch pickles ..."]
    assert all(line.endswith(" ...") for line in done.stderr.splitlines()), "neither warnings nor bars"
    assert done.stdout.splitlines()[0].startswith("new: llama, ")
    assert done.stdout.splitlines()[1] == "note: left out: trainer_state.json"
    again = sdft("old", "new", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "sdft: new exists and is not empty → give the name of a new folder\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    pickled(tmp_path / "old", hidden=1024, num_blocks=8, dtype="float32", head_dim=256)
    command = [sys.executable, "-m", "sdft_ray.cli", "import", "old", "new"]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("reading the weights"):
            break
    while not list(tmp_path.glob(".new.*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    assert process.wait(60) == 130
    process.stderr.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
