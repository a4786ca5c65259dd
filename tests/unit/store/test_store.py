from __future__ import annotations

import multiprocessing
import uuid
from pathlib import Path

import pytest

from sdft_ray.errors import StoreError
from sdft_ray.store.fingerprint import canonical_json, content_digest, file_digest, fingerprint
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import MANIFEST, Store, address_of

ADDRESS = address_of("prune", "ab" * 32)


def _commit(store: Store, address: str = ADDRESS, text: str = "weights") -> Manifest:
    output = store.work(address) / "output"
    output.mkdir(exist_ok=True)
    (output / "part").mkdir(exist_ok=True)
    (output / "part/a.txt").write_text(text, encoding="utf-8")
    files = store.place(address, output)
    stage = address.split("/")[0]
    manifest = Manifest(stage, stage, address, "ab" * 32, "{}", {}, files, Usage(1.5, 0, 10, 3), {"n": 1})
    store.commit(manifest)
    return manifest


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_commit_then_read(store: Store) -> None:
    assert store.manifest(ADDRESS) is None
    manifest = _commit(store)
    assert store.manifest(ADDRESS) == manifest
    assert (store.path(ADDRESS) / "part/a.txt").read_text(encoding="utf-8") == "weights"
    assert store.manifests("prune") == [manifest]
    assert store.manifests("train") == []
    assert store.damaged_files(ADDRESS) == []


def test_without_a_manifest_there_is_no_artifact(store: Store) -> None:
    output = store.work(ADDRESS) / "output"
    output.mkdir()
    (output / "a.txt").write_text("x", encoding="utf-8")
    store.place(ADDRESS, output)
    assert store.manifest(ADDRESS) is None
    assert store.manifests() == []
    with pytest.raises(StoreError, match="nothing is committed"):
        store.path(ADDRESS)
    _commit(store, text="second")  # what a dead run placed is replaced, not mixed in
    assert sorted(store.manifest(ADDRESS).files) == ["part/a.txt"]  # type: ignore[union-attr]


def test_committed_artifacts_are_never_overwritten(store: Store) -> None:
    _commit(store)
    with pytest.raises(StoreError, match="never overwritten"):
        _commit(store, text="other")
    assert (store.path(ADDRESS) / "part/a.txt").read_text(encoding="utf-8") == "weights"


def test_damage_is_found(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    _commit(store)
    (tmp_path / ADDRESS / "part/a.txt").write_text("weightz", encoding="utf-8")
    assert store.damaged_files(ADDRESS) == ["part/a.txt"]
    (tmp_path / ADDRESS / "part/a.txt").unlink()
    assert store.damaged_files(ADDRESS) == ["part/a.txt"]
    (tmp_path / ADDRESS / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="damaged manifest"):
        store.manifest(ADDRESS)


def test_work_directory_is_stable_until_the_commit(store: Store) -> None:
    (store.work(ADDRESS) / "half.txt").write_text("x", encoding="utf-8")
    assert (Store(store.url).work(ADDRESS) / "half.txt").exists()
    _commit(store)
    assert not (store.work(ADDRESS) / "half.txt").exists()


def _hold(url: str, held: multiprocessing.Event, release: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with Store(url).lock(ADDRESS):
        held.set()
        release.wait(20)


def test_two_processes_never_make_the_same_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, release))
    other.start()
    assert held.wait(20)
    with pytest.raises(StoreError, match="another run is making"), Store(str(tmp_path)).lock(ADDRESS):
        pass
    release.set()
    other.join(20)
    with Store(str(tmp_path)).lock(ADDRESS):
        pass


def test_runs_point_at_artifacts(store: Store) -> None:
    assert store.runs() == []
    store.write_run("quickstart", {"steps": {}})
    assert store.runs() == ["quickstart"]
    assert store.run("quickstart") == {"steps": {}}
    with pytest.raises(StoreError, match=r"no run named 'other'.*runs here: quickstart"):
        store.run("other")


def test_unwritable_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match="not writable"):
        Store(str(tmp_path / "file" / "store")).check_writable()
    with pytest.raises(StoreError, match="cannot open store"):
        Store("nosuch://bucket")


def test_outside_digests_follow_content_not_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.check_writable()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("same", encoding="utf-8")
    assert store.outside_digest(tmp_path / "a") == store.outside_digest(tmp_path / "b")
    before = store.outside_digest(tmp_path / "a")
    (tmp_path / "a/x.txt").write_text("diff", encoding="utf-8")
    assert store.outside_digest(tmp_path / "a") != before
    assert store.outside_digest(tmp_path / "a") == content_digest(tmp_path / "a")


def test_digests_have_known_values(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"")
    assert file_digest(tmp_path / "e") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null,true]}'
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), float("nan"), {1: 2}, object(), b"x"])
def test_values_without_a_stable_form_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)
