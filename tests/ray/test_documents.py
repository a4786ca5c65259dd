"""Python of the documentation that makes a run, on a tiny world in place of the laboratory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.documents import blocks
from tests.support.worlds import make_world, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

PAGES = ("docs/quickstart.md",)
"""Pages with such blocks; `tests/contracts/test_documents.py` checks that none is missing."""


@pytest.mark.parametrize("page", PAGES)
def test_python_that_makes_a_run_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page in order, as a reader runs them, with light resources in place of the default ones."""
    written = write_recipe(make_world(tmp_path / "world"))
    (tmp_path / "build/lab").mkdir(parents=True)
    shutil.copy(written, tmp_path / "build/lab/quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in (block for block in blocks("python") if block.page == page):
        light = block.text.replace("Resources()", f"Resources.load({str(written.with_name('resources.yaml'))!r})")
        exec(compile(light, str(block), "exec"), names)
    assert {"sft", "sdft"} == set(names["run"].to_json()["recovery"])  # type: ignore[attr-defined]
