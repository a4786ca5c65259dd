"""What travels with a submitted job, and clusters that refuse it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sdft_ray.errors import ResourceError
from sdft_ray.pipeline.preflight import check_tasks
from sdft_ray.pipeline.submit import _send, _until_it_runs, bundle
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.sources import Sources
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


@pytest.mark.parametrize("store", ["store", "memory://sdft"])
@pytest.mark.parametrize("field", ["include", "data"])
def test_what_tasks_read_goes_along_and_counts_as_the_same(tmp_path: Path, store: str, field: str) -> None:
    """Files beside the folder of task files, named in each way; of the folder of data sets what is read."""
    home = tmp_path / "home"
    for name in ("outside", "absolute", "work/here"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 2, encoding="utf-8")
    files = {"train": "../outside.jsonl", "validation": str(home / "absolute.jsonl"), "test": "here.jsonl"}
    rest = {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer", "test_split": "test"}
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **rest}
    (home / "tasks").mkdir()
    (home / "base.yaml").write_text(yaml.safe_dump(base).replace("../outside", "outside"), encoding="utf-8")
    (home / "tasks/t.yaml").write_text("include: ../base.yaml\ntask: t\n", encoding="utf-8")
    for name in ("gsm8k/test", "other/test"):
        (home / "data" / name).parent.mkdir(parents=True)
        (home / f"data/{name}.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    tasks = ({"name": "t"},) if field == "include" else ({"name": "gsm8k", "num_fewshot": 0},)
    folder = home / ("tasks" if field == "include" else "data")
    recipe = make_recipe(tmp_path, _teacher(tmp_path), evaluate={"tasks": tasks, field: str(folder)})
    (tmp_path / "job").mkdir()
    at = Store(store if "://" in store else str(tmp_path / store))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home / "work")
        before = Sources(recipe, at)("tasks")
        bundle(recipe, tmp_path / "job", at)
    shutil.rmtree(home)
    sent = Recipe.load(tmp_path / "job/recipe.yaml")
    assert Sources(sent, at)("tasks") == before
    check_tasks(sent)
    if field == "data":
        assert not [path for path in tmp_path.rglob("other") if path.is_dir()]
    else:
        assert [next(iter(part)) for part in before["outside"]] == [
            "base.yaml", "here.jsonl", "outside.jsonl", "absolute.jsonl",
        ]  # fmt: skip


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


class _Pending:
    """A job that waits for so many questions, and a clock that moves by ten seconds a question."""

    def __init__(self, questions: int) -> None:
        self.left, self.now = questions, 0.0

    def get_job_status(self, job_id: str) -> SimpleNamespace:
        self.left, self.now = self.left - 1, self.now + 10.0
        return SimpleNamespace(value="PENDING" if self.left > 0 else "RUNNING")


def test_a_job_that_waits_says_so_every_45_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        assert seconds <= 1

    monkeypatch.setattr(asyncio, "sleep", at_once)
    told, cluster = [], _Pending(12)
    asyncio.run(_until_it_runs(cluster, "run-1", told.append, clock=lambda: cluster.now))
    assert told == [
        "job run-1 waits for the cluster, 50.0 s so far",
        "job run-1 waits for the cluster, 1 min 40 s so far",
    ]
