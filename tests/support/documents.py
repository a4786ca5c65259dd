"""README and docs/ as tests read them: pages, fenced blocks, inline code, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. `title` is the file that it is an excerpt of, such as `recipe.yaml`."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> dict[str, str]:
    """Path relative to the root -> text: README and its neighbours, everything in docs/, and the log of results."""
    files = [*sorted(ROOT.glob("*.md")), ROOT / "jobs/recipes/LOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def blocks(*languages: str) -> list[Block]:
    """Fenced blocks of all pages, of the given languages; "" stands for none."""
    return [block for page, text in pages().items() for block in _blocks(page, text) if block.language in languages]


def _blocks(page: str, text: str) -> Iterator[Block]:
    for match in _FENCE.finditer(text):
        language, title, content = match.groups()
        yield Block(page, text.count("\n", 0, match.start()) + 1, language, title or "", content)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def shell_lines(page: str, text: str) -> Iterator[str]:
    """Command lines of a page: those of its `sh` blocks without comments, and inline code."""
    for block in _blocks(page, text):
        if block.language == "sh":
            yield from (line.split("  #")[0].strip() for line in block.text.splitlines())
    yield from inline_code(text)


def links(text: str) -> list[str]:
    """Targets of links and images in the prose of a page, reference links included."""
    inline = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
