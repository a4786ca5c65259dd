"""The row cache: parts appear whole, damage shows, and it serves one configuration only."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from sdft_ray.data.row_cache import IDENTITY, RowCache
from sdft_ray.errors import StoreError

CHUNK = "0123456789abcdef"
ROWS = pa.table({"text": ["a", "b"]})


@pytest.fixture(params=["local", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> RowCache:
    return RowCache(str(tmp_path / "rows") if request.param == "local" else f"memory://{tmp_path}/rows")


def test_parts_come_back_in_the_order_they_were_numbered(cache: RowCache) -> None:
    names = [cache.write(CHUNK, number, pa.table({"text": [str(number)]})) for number in (0, 1, 10, 2)]
    other = cache.write("0123456789abcdee", 0, ROWS)
    assert cache.parts_of(CHUNK) == [names[0], names[1], names[3], names[2]]
    assert sorted(cache.parts()) == sorted([*names, other])
    read = cache.read(names[2])
    assert read is not None
    assert read["text"].to_pylist() == ["10"]


def test_some_columns_of_a_part(cache: RowCache) -> None:
    name = cache.write(CHUNK, 0, ROWS.append_column("large", pa.array([b"x", b"y"])))
    read = cache.read(name, ["text"])
    assert read is not None
    assert read.equals(ROWS)


def test_an_empty_cache_has_no_parts(cache: RowCache) -> None:
    assert list(cache.parts()) == []
    assert cache.parts_of(CHUNK) == []


def test_the_same_rows_make_the_same_part(cache: RowCache) -> None:
    assert cache.write(CHUNK, 0, ROWS) == cache.write(CHUNK, 0, ROWS)
    assert len(list(cache.parts())) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_part_is_found_out_and_removed(tmp_path: Path, damage: str) -> None:
    cache = RowCache(str(tmp_path))
    name = cache.write(CHUNK, 0, ROWS)
    content = (tmp_path / name).read_bytes()
    changed = {"cut": content[:-7], "changed": content[:9] + b"x" + content[10:], "empty": b""}[damage]
    (tmp_path / name).write_bytes(changed)
    assert cache.read(name) is None
    assert list(cache.parts()) == []


def test_an_unfinished_part_is_no_part(tmp_path: Path) -> None:
    cache = RowCache(str(tmp_path))
    name = cache.write(CHUNK, 0, ROWS)
    (tmp_path / name).rename(tmp_path / f"{name}.0badf00d.partial")
    assert list(cache.parts()) == []


def test_another_configuration_is_refused(cache: RowCache) -> None:
    cache.claim({"temperature": 0.0, "seed": 1, "teacher": {"content": "ab"}})
    cache.claim({"seed": 1, "temperature": 0.0, "teacher": {"content": "ab"}})
    with pytest.raises(StoreError, match=r"temperature \(0.0 there, 0.7 here\)") as caught:
        cache.claim({"temperature": 0.7, "seed": 1, "teacher": {"content": "ab"}})
    assert "seed" not in caught.value.message


def test_an_identity_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / IDENTITY).write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be read"):
        RowCache(str(tmp_path)).claim({"seed": 1})
