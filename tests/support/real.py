"""Real data, templates and tokenizers that lie beside the project; never copied into it.

`SDFT_REAL_DATA` names another folder. Without the folder the tests that need it are skipped, which CI refuses.
"""

import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

REAL = Path(os.environ.get("SDFT_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "real"))

needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no real data at {REAL}: SDFT_REAL_DATA names its folder"
)


def real(*parts: str) -> Path:
    """A file or folder of the real data."""
    path = REAL.joinpath(*parts)
    assert path.exists(), f"no {path}"
    return path


def real_rows(*parts: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` or `.jsonl.gz` file."""
    path = real(*parts)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit) if limit else iter(int, 1), strict=False)]


def unpacked(name: str, directory: Path) -> Path:
    """A tokenizer of the real data, its packed files unpacked into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in real("tokenizers", name).iterdir():
        if path.suffix in _OPEN:
            with _OPEN[path.suffix](path, "rb") as packed, (directory / path.stem).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        else:
            shutil.copy(path, directory / path.name)
    return directory


_OPEN: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
