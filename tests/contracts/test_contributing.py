"""The worked examples for contributors run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs/contributing").glob("*.md"))


def _text(page: str) -> str:
    return (ROOT / "docs/contributing" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    """All blocks of a page, in order, in one namespace; a line number in a traceback is that of the page."""
    text = _text(page)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 3
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        offset = text[: block.start(1)].count("\n")
        exec(compile("\n" * offset + block[1], str(ROOT / "docs/contributing" / page), "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_paths_that_a_page_names_exist(page: str) -> None:
    paths = re.findall(r"\b((?:sdft_ray|tests)/[\w/]+(?:\.py|/))", _text(page))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
