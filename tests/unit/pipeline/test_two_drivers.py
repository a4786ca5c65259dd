"""Two drivers on two machines run the same step over one store: both get one artifact, whoever is first."""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdft_ray.pipeline.scheduler import GraphRun
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import steps
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store
from tests.support.recipes import make_recipe
from tests.support.tiny import make_model

STEP = "calibration"  # it needs no Ray


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store on a shared disk, or one in a bucket. Locks of two machines do not see each other."""
    monkeypatch.setattr(Store, "lock", lambda self, address: contextlib.nullcontext())
    monkeypatch.setattr(platform, "node", lambda: threading.current_thread().name)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}-two-drivers"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Written once, before there are two drivers."""
    make_model(tmp_path / "teacher", "llama")
    return make_recipe(tmp_path, tmp_path / "teacher")


def _run(recipe: Recipe, url: str, on_progress: Callable[[], Any]) -> Manifest:
    """One driver's step; `on_progress` is called when its rows are written and not yet placed."""
    walk = GraphRun(recipe, Store(url), Resources(), recipe.name, steps(recipe))
    walk.refresh()
    board = SimpleNamespace(put=SimpleNamespace(remote=lambda *_: on_progress()))
    return walk.execute(walk.states[STEP], board)


def _is_sound(url: str, manifests: list[Manifest]) -> None:
    first, second = manifests
    store = Store(url)
    assert first == second == store.manifest(first.address)
    assert store.damaged_files(first.address) == []
    assert store.unfinished() == []


def test_both_at_the_same_time(url: str, recipe: Recipe) -> None:
    both_wrote = threading.Barrier(2)
    with ThreadPoolExecutor(2, thread_name_prefix="host") as machines:
        running = [machines.submit(_run, recipe, url, lambda: both_wrote.wait(60)) for _ in range(2)]
        _is_sound(url, [future.result(60) for future in running])


def test_one_commits_while_the_other_still_works(url: str, recipe: Recipe) -> None:
    """The work directory of the slower one may be gone when it goes on."""
    slow_wrote, quick_is_done = threading.Event(), threading.Event()

    def stop_half_way() -> None:
        slow_wrote.set()
        assert quick_is_done.wait(60)

    with ThreadPoolExecutor(2, thread_name_prefix="host") as machines:
        slow = machines.submit(_run, recipe, url, stop_half_way)
        assert slow_wrote.wait(60)
        quick = machines.submit(_run, recipe, url, lambda: None).result(60)
        quick_is_done.set()
        _is_sound(url, [quick, slow.result(60)])


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(60))
def test_both_at_the_same_time_again_and_again(attempt: int, url: str, recipe: Recipe) -> None:
    """Races of a few microseconds between staging, commit and clean-up show in one round of ten to fifty."""
    test_both_at_the_same_time(url, recipe)
