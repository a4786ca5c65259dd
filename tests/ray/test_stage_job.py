"""`jobs/stage.py`: one step of a recipe and the steps that it needs, on real Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.store.store import Store
from tests.support.fork_server import ForkServer
from tests.support.worlds import make_world, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def stage(folder: Path, forks: ForkServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--store", str(folder / "store"), "--resources", str(folder / "resources.yaml"), "--progress", "none"]
    command = [sys.executable, str(ROOT / "jobs/stage.py"), str(folder / "recipe.yaml"), *arguments, *options]
    environment = {**forks.environment(), "HOME": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_a_job_makes_one_step_with_what_it_needs_and_the_next_job_goes_on(tmp_path: Path, forks: ForkServer) -> None:
    write_recipe(make_world(tmp_path))
    unknown = stage(tmp_path, forks, "prunes")
    assert unknown.returncode == 2
    assert "recipe tiny has no step 'prunes' → it has seed, calibration" in unknown.stderr

    first = stage(tmp_path, forks, "generate", "--json")
    assert first.returncode == 0, first.stderr
    made = json.loads(first.stdout)["steps"]
    assert list(made) == ["seed", "generate"]
    store = Store(str(tmp_path / "store"))
    created = {}
    for address in made.values():
        manifest = store.manifest(address)
        assert manifest is not None
        created[address] = manifest.created
    assert not [*store.manifests("calibration"), *store.manifests("select")], "no step that is not needed"
    assert store.runs() == [], "no run is recorded"

    second = stage(tmp_path, forks, "select")
    assert second.returncode == 0, second.stderr
    lines = dict(line.split() for line in second.stdout.splitlines())
    assert list(lines) == ["seed", "generate", "select"]
    assert {name: lines[name] for name in made} == made
    for address, before in created.items():
        manifest = store.manifest(address)
        assert manifest is not None
        assert manifest.created == before, "what the first job made is reused"
