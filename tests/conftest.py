"""One local Ray for each module of tests that needs one, with its own home so that nothing outside is written."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way on tiny models
# Ray keeps the first token that a process saw, and looks for it in the home of the day.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What `datasets` prepares from made data would stay in the user's cache for good. It reads this when imported.
    _prepared = tempfile.TemporaryDirectory(prefix="sdft_ray_tests_")
    os.environ["HF_DATASETS_CACHE"] = _prepared.name


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of three logical CPUs, which all tests of a module share."""
    import ray

    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages.session import ray_session

    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("HOME", str(Path.home()))
    os.environ["HOME"] = str(home)
    try:
        with ray_session(Resources(cpus=3, object_store_bytes=100 * 2**20)):
            yield
        assert not ray.is_initialized()
    finally:
        os.environ["HOME"] = before
