"""What travels with a submitted job, and clusters that refuse it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sdft_ray.errors import ResourceError
from sdft_ray.pipeline.submit import _send, bundle
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.store.store import Store
from tests.support.recipes import make_recipe, write_rows


def _teacher(folder: Path) -> Path:
    (folder / "teacher").mkdir()
    (folder / "teacher/config.json").write_text("{}", encoding="utf-8")
    return folder / "teacher"


def test_files_go_to_a_store_on_a_shared_disk_once(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, _teacher(tmp_path))
    store = Store(str(tmp_path / "store"))
    (tmp_path / "job").mkdir()
    bundle(recipe, tmp_path / "job", store)
    sent = Recipe.load(tmp_path / "job/recipe.yaml")
    for mine, theirs in ((recipe.teacher.model, sent.teacher.model), (recipe.seed_set.source, sent.seed_set.source)):
        assert Path(theirs).is_relative_to(store.url)
        assert Path(theirs).name == Path(mine).name
    assert Path(sent.seed_set.source).read_bytes() == Path(recipe.seed_set.source).read_bytes()
    before = Path(sent.seed_set.source).stat().st_mtime_ns
    bundle(recipe, tmp_path / "job", store)
    assert Path(sent.seed_set.source).stat().st_mtime_ns == before


def test_changed_files_get_a_place_of_their_own(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, _teacher(tmp_path))
    store = Store(str(tmp_path / "store"))
    (tmp_path / "job").mkdir()
    bundle(recipe, tmp_path / "job", store)
    first = Recipe.load(tmp_path / "job/recipe.yaml").seed_set.source
    write_rows(tmp_path / "seed.jsonl", num_rows=7)
    bundle(recipe, tmp_path / "job", store)
    assert Recipe.load(tmp_path / "job/recipe.yaml").seed_set.source != first
    assert Path(first).is_file()


def test_files_travel_with_the_job_to_a_store_elsewhere(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, _teacher(tmp_path))
    (tmp_path / "job").mkdir()
    bundle(recipe, tmp_path / "job", Store("memory://sdft"))
    sent = Recipe.load(tmp_path / "job/recipe.yaml")
    assert Path(sent.teacher.model).is_relative_to(tmp_path / "job")
    assert Path(sent.seed_set.source).is_file()


@pytest.mark.parametrize("store", ["store", "memory://sdft"])
def test_held_out_text_and_its_embedding_model_go_along(tmp_path: Path, store: str) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", offset=50)
    shutil.copytree(teacher := _teacher(tmp_path), tmp_path / "embedder")
    asked = {"source": str(texts), "embedding": str(tmp_path / "embedder")}
    (tmp_path / "job").mkdir()
    place = store if "://" in store else str(tmp_path / store)
    bundle(make_recipe(tmp_path, teacher, forgetting=asked), tmp_path / "job", Store(place))
    sent = Recipe.load(tmp_path / "job/recipe.yaml").forgetting
    assert sent is not None
    assert sent.embedding is not None
    assert sent.source != asked["source"]
    assert Path(sent.source).read_bytes() == texts.read_bytes()
    assert sent.embedding != asked["embedding"]
    assert (Path(sent.embedding) / "config.json").is_file()


class _Cluster:
    """Refuses with the given words before it takes a job."""

    def __init__(self, *refusals: str) -> None:
        self.refusals = list(refusals)

    def submit_job(self, **job: str) -> str:
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        return job["submission_id"]


@pytest.mark.slow
def test_a_cluster_that_has_just_come_up_is_asked_again() -> None:
    cluster = _Cluster("Request failed with status code 500: No available agent to submit job, please try again later.")
    assert _send(cluster, submission_id="run-1") == "run-1"


@pytest.mark.parametrize(
    ("words", "patience_s", "then"),
    [
        ("No available agent.", -1.0, "dashboard-agent-listen-port"),
        ("disk full\nTraceback", 60.0, "see the Ray dashboard"),
    ],
)
def test_a_cluster_that_refuses_is_named(words: str, patience_s: float, then: str) -> None:
    with pytest.raises(
        ResourceError, match=f"does not accept the job: {words.splitlines()[0].rstrip('.')} .*{then}"
    ) as caught:
        _send(_Cluster(*[words] * 3), patience_s=patience_s, submission_id="run-1")
    assert "Traceback" not in str(caught.value)
