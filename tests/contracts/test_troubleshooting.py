"""docs/troubleshooting.md quotes messages that the program really writes."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.documents import ROOT, pages

GAP = "\0"


def messages() -> set[str]:
    """All texts of the package, with a gap where a value is filled in, and of the Makefile."""
    found = {(ROOT / "Makefile").read_text(encoding="utf-8")}
    for path in (ROOT / "sdft_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


TEXTS = messages()


def quoted_messages() -> list[str]:
    """Messages in the first column of the troubleshooting tables; words in capitals stand for what is filled in."""
    rows = re.findall(r"^\| (.+?) \|", pages()["docs/troubleshooting.md"], flags=re.MULTILINE)
    return [code for row in rows if row.startswith("`") for code in re.findall(r"`([^`]+)`", row)]


def is_real(message: str) -> bool:
    """Whether the constant parts of a message are in a text of the package, or a text with gaps yields the message."""
    parts = [part.strip() for part in re.split(r"\b[A-Z]+\b(?:/[A-Z]+)?", message) if part.strip()]
    said = re.compile("[^\n]*?".join(map(re.escape, parts)))
    if any(said.search(text) for text in TEXTS):
        return True
    templates = [text for text in TEXTS if GAP in text and len(text.replace(GAP, "").strip()) >= 10]
    return any(re.fullmatch(".+?".join(map(re.escape, text.split(GAP))), message) for text in templates)


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_real(message: str) -> None:
    assert is_real(message)


def test_a_message_that_nobody_writes_is_noticed() -> None:
    assert is_real("cannot start Ray: REASON")
    assert is_real("unsupported architecture NAME")
    assert not is_real("cannot start the engine of NAME")
    assert not is_real("STAGE needs X CPUs at least")
