"""The notebook of the documentation, cell by cell, as a reader runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/notebooks/compress.ipynb"


def _code() -> dict[str, str]:
    """Cell number -> source."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells), "cells are committed without outputs"
    sources = {f"cell {number}": "".join(cell["source"]) for number, cell in enumerate(cells) if "outputs" in cell}
    assert sources
    return sources


@pytest.mark.slow
def test_the_notebook_is_valid_up_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its recipe, its resources and the plan of its run; everything after that compiles."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    sources = iter(_code().items())
    for cell, source in sources:
        if "compress(" in source:
            break
        exec(compile(source, cell, "exec"), names)
    for cell, source in sources:
        compile(source, cell, "exec")
    steps = {line.step: line.status for line in names["plan"].lines}
    assert {"prune", "train:sft", "train:sdft", "evaluate:sdft", "report"} <= steps.keys()
    assert "done" not in steps.values()
    assert "evaluate:sdft" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
def test_the_notebook_runs_from_top_to_bottom(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell, source in _code().items():
        exec(compile(source, cell, "exec"), names)
    assert Path(names["report"]).stat().st_size > 10_000
    assert set(names["result"]["recovery"]) == {"sft", "sdft"}
    assert "evaluate:sdft" in capfd.readouterr().err
