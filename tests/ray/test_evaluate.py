"""The pool of engines: the same scores as in one process, one pool for several models, and nothing asked twice."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray.exceptions import RayTaskError

from sdft_ray.evaluation.harness import EvalConfig
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import evaluate, evaluators
from sdft_ray.stages.job import StageContext, StageResult
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.store import Store
from tests.support.asking import result_of
from tests.support.jobs import make_job, moved
from tests.support.processes import ray_processes
from tests.support.staged import output_of
from tests.support.tiny import make_model
from tests.support.worlds import world_data, write_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

NUM_SUMS = 120
SUM_TASK: dict[str, Any] = {
    "task": "tiny_sum",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TASKS = ["tiny_task", "tiny_sum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a task to choose and one to write."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher", "llama", num_blocks=4)
    make_model(folder / "other", "llama", num_blocks=2, seed=1)
    write_tasks(folder)
    (folder / "tasks/tiny_sum.yaml").write_text(yaml.safe_dump(SUM_TASK), encoding="utf-8")
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(NUM_SUMS)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "tasks/sums.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    evaluators.release_idle()


def job_of(folder: Path, model: str, number: int, **settings: Any) -> StageContext:
    data = world_data(folder, evaluate={"include": str(folder / "tasks"), "tasks": tuple({"name": t} for t in TASKS)})
    part = {"cpus": 0.5, "sampler": "transformers", "num_actors": 2, **settings}
    return make_job(
        step="evaluate:teacher",
        address=f"evaluate/{number:016x}",
        store_url=Store(str(folder / "store")).url,
        recipe=Recipe.parse(data),
        resources=Resources.model_validate({"evaluate": part}),
        teacher=ModelSource(directory=str(folder / model)),
        inputs={},
    )


def scores_of(job: StageContext, made: StageResult) -> Scores:
    assert set(made.files) == {files.SCORES, files.ITEMS}
    path = output_of(job)
    scores = Scores.from_json(json.loads((path / files.SCORES).read_text(encoding="utf-8")))
    items = pq.read_table(path / files.ITEMS).to_pylist()
    assert {(row["task"], row["item"], row["value"]) for row in items} == {
        (name, item, value) for name, score in scores.tasks.items() for item, value in score.items.items()
    }
    return scores


def alone(folder: Path, model: str) -> Scores:
    return result_of(folder / model, TASKS, include=folder / "tasks", dtype="float32").scores


def actor_pids() -> list[int]:
    """Of the Ray of this process: others may evaluate on this machine at the same time."""
    return sorted(process.pid for process in ray_processes("Evaluator"))


def test_one_pool_asks_one_model_after_another(folder: Path) -> None:
    """Two actors share the questions; scores and texts are those of one process, item by item."""
    found, pids = {}, []
    jobs = {model: job_of(folder, model, number) for number, model in enumerate(("teacher", "other"))}
    for model, job in jobs.items():
        made = evaluate.run(job)
        found[model] = scores_of(job, made)
        pids.append(actor_pids())
        assert made.summary["num_reused"] == 0
        assert [(used["kind"], used["dtype"]) for used in made.summary["engines"]] == [("transformers", "float32")]
    assert len(pids[0]) == 2
    assert pids[0] == pids[1]
    assert evaluators.idle_resources() == (1.1, 0.0)
    admitted = jobs["teacher"].resources.evaluate, 1
    assert evaluators.idle_resources(*admitted) == (0.0, 0.0), "the next evaluation takes them"
    evaluators.release_idle(*admitted)
    assert actor_pids() == pids[0]
    evaluators.release_idle()
    assert evaluators.idle_resources() == (0.0, 0.0)
    for model, scores in found.items():
        assert scores == alone(folder, model)
    assert found["teacher"].tasks["tiny_sum"].outputs != found["other"].tasks["tiny_sum"].outputs


def test_a_killed_engine_costs_no_answer(folder: Path) -> None:
    job = job_of(folder, "teacher", 2)
    before = set(actor_pids())

    def kill_one() -> None:
        answers = job.work() / "answers.jsonl"
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if answers.exists() and answers.read_text(encoding="utf-8").count("\n") >= 10:
                os.kill(min(set(actor_pids()) - before), signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=kill_one)
    thread.start()
    made = evaluate.run(job)
    thread.join()
    assert scores_of(job, made) == alone(folder, "teacher")


def test_an_interrupted_step_asks_for_the_rest_alone(folder: Path) -> None:
    """Half of the answers of an earlier attempt, and a torn line."""
    whole = job_of(folder, "teacher", 3)
    kept = whole.work() / "answers.jsonl"
    with evaluators.acquire(whole.resources.evaluate, evaluate.Harness) as crew:
        ray.get(ray.remote(ask_all).options(num_cpus=0.1).remote(whole, crew.engines, kept))
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(lines) // 2
    kept.write_text("".join(lines[:half]) + lines[half][:20], encoding="utf-8")
    made = evaluate.run(whole)
    assert made.summary["num_reused"] == half
    assert scores_of(whole, made) == alone(folder, "teacher")


def ask_all(job: StageContext, actors: list[Any], kept: Path) -> None:
    from sdft_ray.evaluation.harness import evaluate as harness

    pool = evaluators.EngineClient(job, actors, kept)
    harness(job.model("model"), EvalConfig(TASKS, job.places.tasks.include), pool)


def test_a_model_that_cannot_be_loaded_ends_the_step_with_its_reason(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "broken", "llama")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job = job_of(folder, "teacher", 4)
    broken = moved(job, ModelSource(directory=str(tmp_path / "broken")))
    with pytest.raises(RayTaskError, match="safetensors"):
        evaluate.run(broken)
    assert evaluators.idle_resources() == (0.0, 0.0)
