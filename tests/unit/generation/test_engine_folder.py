"""Temporary files of engines: gone with the engine, and after a killed process at the next look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sdft_ray.generation.engine_folder import EngineFolder, remove_abandoned


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for this test and the processes that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_everything_that_an_engine_leaves_goes_with_it(temporary: Path) -> None:
    folder = EngineFolder()
    with folder.used():
        assert tempfile.gettempdir() == str(folder.path)
        in_child = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
        assert subprocess.check_output(in_child, text=True).strip() == str(folder.path)
        (Path(tempfile.gettempdir()) / "vllm_dist_1").write_text("left behind")
    assert tempfile.gettempdir() == str(temporary)
    assert os.environ["TMPDIR"] == str(temporary)
    remove_abandoned()
    assert (folder.path / "vllm_dist_1").exists()  # in use, however often anyone looks
    folder.close()
    folder.close()
    assert list(temporary.iterdir()) == []


def test_an_engine_that_does_not_start(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), EngineFolder().used():
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []
    assert tempfile.gettempdir() == str(temporary)


def test_compiled_kernels_stay_for_the_next_engine(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder = EngineFolder()
    with folder.used():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{temporary}/torchinductor_")
    folder.close()


_FORKED = """
import os
from sdft_ray.generation.engine_folder import EngineFolder
folder = EngineFolder()
child = os.fork()
if child:
    os.waitpid(child, 0)
    assert folder.path.is_dir(), "the end of a fork is not the end of its parent"
"""


def test_a_process_that_ends_without_a_word(temporary: Path) -> None:
    subprocess.run([sys.executable, "-c", _FORKED], check=True)
    assert list(temporary.iterdir()) == []


_LIVING = """
import sys, time
from sdft_ray.generation.engine_folder import EngineFolder
folder = EngineFolder()
print(folder.path, flush=True)
time.sleep(600)
"""


def test_a_killed_process_leaves_nothing_for_long(temporary: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _LIVING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        path = Path(process.stdout.readline().strip())
        (path / "vllm_dist_1").write_text("")
        remove_abandoned()
        assert path.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ours = EngineFolder()
    assert not path.exists()
    assert ours.path.is_dir()
    ours.close()
    assert list(temporary.iterdir()) == []
