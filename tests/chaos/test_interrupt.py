"""Ctrl-C and a killed driver: the store stays sound, and the same command continues."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.pipeline.run import Run
from sdft_ray.progress import parse_event
from sdft_ray.store.store import Store
from tests.support.fork_server import ForkServer
from tests.support.worlds import make_world, world_data, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
HEED_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A shell's background jobs ignore the signal, and so do their children unless told otherwise."""


def _command(folder: Path) -> list[str]:
    """The entry point for Ray Jobs, which is the command in another coat."""
    options = ["--store", str(folder / "store"), "--resources", str(folder / "resources.yaml"), "--progress", "json"]
    return [sys.executable, str(ROOT / "jobs/compress.py"), str(folder / "recipe.yaml"), *options]


def _start(folder: Path, forks: ForkServer) -> subprocess.Popen[str]:
    environment = {**forks.environment(), "HOME": str(folder)}
    command = [sys.executable, "-c", HEED_CTRL_C, *_command(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _until(process: subprocess.Popen[str], kind: str, stage: str) -> None:
    """Read events until one has come."""
    assert process.stdout is not None
    for line in process.stdout:
        event = parse_event(line)
        if event is not None and (event.event, event.stage) == (kind, stage):
            return
    pytest.fail(f"the run ended without {kind} of {stage}: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.parametrize(
    "signal_number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGTERM, id="terminate", marks=pytest.mark.nightly),
        pytest.param(signal.SIGKILL, id="kill", marks=pytest.mark.nightly),
    ],
)
def test_a_stopped_run_continues(tmp_path: Path, forks: ForkServer, signal_number: signal.Signals) -> None:
    folder = make_world(tmp_path)
    recipe = world_data(folder)
    del recipe["train"]["arms"]["sft"]
    write_recipe(folder, train=recipe["train"])
    process = _start(folder, forks)
    _until(process, "stage_finished", "prune")
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=240)
    assert process.returncode == (-signal.SIGKILL if signal_number is signal.SIGKILL else 130), error
    if signal_number is not signal.SIGKILL:
        assert "run the same command again" in error
        assert "Traceback" not in error
    store = Store(str(folder / "store"))
    kept = {manifest.step for manifest in store.manifests()}
    assert "prune" in kept
    assert all(store.damaged_files(manifest.address) == [] for manifest in store.manifests())
    assert store.runs() == []

    process = _start(folder, forks)
    _, error = process.communicate(timeout=480)
    assert process.returncode == 0, error
    run = Run.open(store, "tiny")
    assert {stage["name"] for stage in run.stages() if stage["skipped"]} >= kept
    assert all(store.damaged_files(stage["address"]) == [] for stage in run.stages())
