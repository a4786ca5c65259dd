from __future__ import annotations

import stat
import threading
import uuid
from pathlib import Path

import fsspec
import pytest

from sdft_ray.store.atomic import create, replacing, write_file, write_to


def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/a.txt"
    write_file(target, "first")
    write_file(target, b"second")
    assert target.read_bytes() == b"second"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_file(target, "old")
    with pytest.raises(RuntimeError, match="half way"):
        _fail_half_way(target)
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def _fail_half_way(target: Path) -> None:
    with replacing(target) as partial:
        partial.write_text("half", encoding="utf-8")
        raise RuntimeError("half way")


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    contents = ["x" * 100_000, "y" * 200_000]
    write_file(target, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_file(target, content, sync=False)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert all(target.read_text(encoding="utf-8") in contents for _ in range(200))
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_permissions_of_a_secret(tmp_path: Path) -> None:
    write_file(tmp_path / "keys", "secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_a_folder_takes_a_free_place_only(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / "a.txt").write_text(text, encoding="utf-8")
    assert (tmp_path / "folder/a.txt").read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_any_file_system_is_written(kind: str, tmp_path: Path) -> None:
    url = str(tmp_path) if kind == "local" else f"memory://{uuid.uuid4().hex}"
    filesystem, root = fsspec.core.url_to_fs(url)
    for text in ("ü", "again"):
        write_to(filesystem, f"{root}/a/b.txt", text)
        assert filesystem.cat_file(f"{root}/a/b.txt") == text.encode()


def test_an_object_is_created_once() -> None:
    filesystem, root = fsspec.core.url_to_fs(f"memory://{uuid.uuid4().hex}")
    assert create(filesystem, f"{root}/a", b"first")
    assert not create(filesystem, f"{root}/a", b"second")
    assert filesystem.cat_file(f"{root}/a") == b"first"
