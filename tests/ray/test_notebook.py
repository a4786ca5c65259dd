"""The notebook of the documentation, cell by cell, as a reader runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/notebooks/compress.ipynb"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_notebook_runs_from_top_to_bottom(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "cells are committed without outputs"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert Path(names["report"]).stat().st_size > 10_000
    assert set(names["result"]["recovery"]) == {"pruned", "sft", "sdft"}
    assert "evaluate:sdft" in capfd.readouterr().err
