"""Which line of a log is quoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft_ray.progress.logs import last_words, tail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("\n  \n----\n", ""),
        ("loading\nready\n", "ready"),
        ("Traceback (most recent call last):\n  File 'x'\nValueError: no\nlater line\n", "ValueError: no"),
        ("\x1b[36m(EngineCore pid=7)\x1b[0m ERROR 11-29 07:00:01 [core.py:99] OSError: full\n", "OSError: full"),
        ("KeyError: 'a'\nRuntimeError: Engine core failed. See root cause above.\n", "KeyError: 'a'"),
        ("x\n*** SIGSEGV received at time=1 ***\nPC: @ 0x1\n    @ 0x2\n", "*** SIGSEGV received at time=1 ***"),
        ("started\n[2026-11-29 07:00:00,000 E 1 1] core_worker.cc:1: gone\n", "started"),
        ("torch.OutOfMemoryError: no\nStack (most recent call first):\n", "torch.OutOfMemoryError: no"),
    ],
)  # fmt: skip
def test_last_words(text: str, words: str) -> None:
    assert last_words(text) == words


def test_the_end_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a" * 2**20 + b"\nlast\n")
    assert tail(path).endswith("\nlast\n")
    assert len(tail(path)) == 256 * 2**10
    assert tail(tmp_path / "none") == ""
