from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import StoreError
from sdft_ray.store.atomic import write_to
from sdft_ray.store.fingerprint import canonical_json, content_digest, file_digest, fingerprint
from sdft_ray.store.manifest import FileEntry, Manifest, Usage
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
    return store.commit(manifest)


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


@pytest.mark.slow
def test_two_processes_never_make_the_same_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, release))
    other.start()
    assert held.wait(20)
    with pytest.raises(StoreError, match="another run is computing"), Store(str(tmp_path)).lock(ADDRESS):
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


def _stage(store: Store, text: str) -> Manifest:
    """Stage an artifact of `text` as a driver does, and return what it would commit."""
    output = store.work(ADDRESS) / f"output-{uuid.uuid4().hex}"
    output.mkdir()
    (output / "weights.txt").write_text(text, encoding="utf-8")
    return Manifest("prune", "prune", ADDRESS, "ab" * 32, "{}", {}, store.place(ADDRESS, output), Usage(), {"by": text})


def _sound(store: Store) -> str:
    """What the committed artifact says, after a check of its bytes."""
    manifest = store.manifest(ADDRESS)
    assert manifest is not None
    assert store.damaged_files(ADDRESS) == []
    text = (store.path(ADDRESS) / "weights.txt").read_text(encoding="utf-8")
    assert manifest.summary == {"by": text}
    assert store.unfinished() == []
    return text


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_drivers_the_first_commit_counts_and_the_other_takes_it_over(store: Store, first: int) -> None:
    """Two machines with one bucket: their locks do not see each other, and training gives other bytes each time."""
    drivers = [Store(store.url), Store(store.url)]
    staged = [_stage(driver, text) for driver, text in zip(drivers, ("one", "two"), strict=True)]
    committed = [drivers[number].commit(staged[number]) for number in (first, 1 - first)]
    assert committed[0] == committed[1]
    assert _sound(store) == ("one", "two")[first]


def test_a_driver_that_is_late_by_a_whole_commit_changes_nothing(store: Store) -> None:
    late = _stage(Store(store.url), "late")
    early = Store(store.url)
    early.commit(_stage(early, "early"))
    with pytest.raises(StoreError, match="never overwritten"):
        _stage(Store(store.url), "later still")
    assert Store(store.url).commit(late).summary == {"by": "early"}
    assert _sound(store) == "early"


def test_what_one_driver_finds_superseded_stays_when_another_was_first(store: Store) -> None:
    one, two = _stage(store, "one"), _stage(store, "two")
    store.write_study("s", "part", b"rows")
    store.commit(one)
    store.commit(two, ["studies/s/part"])
    assert store._fs.exists(f"{store._root}/studies/s/part")
    other = address_of("prune", "cd" * 32)
    store.commit(Manifest("prune", "prune", other, "cd" * 32, "{}", {}, {}, Usage()), ["studies/s/part"])
    assert not store._fs.exists(f"{store._root}/studies/s/part")


def test_files_of_a_killed_driver_are_listed_and_the_next_commit_removes_them(store: Store) -> None:
    _stage(store, "killed before its commit")
    (left,) = {path for path in store.unfinished() if "prune" in path}
    assert store._fs.exists(f"{store._root}/{left}")
    store.commit(_stage(store, "second attempt"))
    assert _sound(store) == "second attempt"
    assert not store._fs.exists(f"{store._root}/{left}")


def test_a_driver_whose_staged_files_are_gone_commits_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest = _stage(store, "x")
    shutil.rmtree(store.work(ADDRESS))
    with pytest.raises(StoreError, match=r"the files of .* were removed"):
        store.commit(manifest)
    assert store.manifest(ADDRESS) is None


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_artifacts_of_earlier_versions_are_read_and_their_half_placed_files_replaced(
    scheme: str, tmp_path: Path
) -> None:
    """They lay directly at the address, placed there before the manifest."""
    store = Store(f"{scheme}{tmp_path}" if scheme else str(tmp_path))
    write_to(store._fs, f"{store._root}/{ADDRESS}/weights.txt", "half")
    store.commit(_stage(store, "whole"))
    assert _sound(store) == "whole"
    old = address_of("train", "ef" * 32)
    write_to(store._fs, f"{store._root}/{old}/a.txt", "kept")
    entry = FileEntry(hashlib.sha256(b"kept").hexdigest(), 4)
    text = Manifest("train:a", "train", old, "ef" * 32, "{}", {}, {"a.txt": entry}, Usage()).to_json()
    without_folder = {name: value for name, value in json.loads(text).items() if name != "folder"}
    write_to(store._fs, f"{store._root}/{old}/{MANIFEST}", json.dumps(without_folder))
    assert store.damaged_files(old) == []
    assert (store.path(old) / "a.txt").read_text(encoding="utf-8") == "kept"


def _race(url: str, text: str, staged: Any, go: Any) -> None:
    """A driver on a machine of its own: no lock, its own moment."""
    store = Store(url)
    manifest = _stage(store, text)
    staged.release()
    go.wait(30)
    store.commit(manifest)


@pytest.mark.slow
@pytest.mark.parametrize("order", [("one", "two"), ("two", "one"), ("both",)])
def test_two_processes_over_one_disk_with_locks_of_their_own(order: tuple[str, ...], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    staged, go = context.Semaphore(0), {name: context.Event() for name in ("one", "two")}
    drivers = {name: context.Process(target=_race, args=(str(tmp_path), name * 1000, staged, go[name])) for name in go}
    for driver in drivers.values():
        driver.start()
    for _ in drivers:
        assert staged.acquire(timeout=60)
    if order == ("both",):
        for event in go.values():
            event.set()
    for name in order if order != ("both",) else ():
        go[name].set()
        drivers[name].join(60)
    for driver in drivers.values():
        driver.join(60)
        assert driver.exitcode == 0
    found = _sound(Store(str(tmp_path)))
    assert found in ({"one" * 1000, "two" * 1000} if order == ("both",) else {order[0] * 1000})
