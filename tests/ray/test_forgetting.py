"""What was forgotten, on real Ray: all models on held-out text and on the seed set, answers beside the teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sdft_ray.data.calibration import row_documents
from sdft_ray.data.chat import load_tokenizer
from sdft_ray.evaluation.shift import mean_nll, response_nll
from sdft_ray.evaluation.similarity import embed, load_embedder
from sdft_ray.models.loading import load_model
from sdft_ray.pipeline.compress import compress
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.store import files
from tests.support.embedder import make_embedder
from tests.support.worlds import ONE_WORKER, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

RESOURCES = Resources.model_validate({**ONE_WORKER, "generate": {"sampler": "scripted", "cpus": 0.5}})
MODELS = ["teacher", "pruned", "sft"]


@pytest.fixture(scope="module")
def folder(world: Path) -> Path:
    """Rewrites of the scripted sampler are kept, since responses are not checked; one task asks for words."""
    make_embedder(world / "embedder", pooling="mean")
    texts = [{"reference": f"Tom has {i} apples and gives {i % 3} to Ann."} for i in range(20)]
    (world / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return world


def recipe(folder: Path, **forgetting: object) -> Recipe:
    data = world_data(folder)
    part = {"source": str(folder / "texts.jsonl"), "num_rows": 8, "embedding": str(folder / "embedder"), **forgetting}
    arms = {"sft": {"data": "reference", "learning_rate": 1e-3}}
    return Recipe.parse(
        {
            **data,
            "seed_set": {"source": str(folder / "unchecked.jsonl")},
            "train": {**data["train"], "arms": arms},
            "evaluate": {**data["evaluate"], "tasks": ({"name": "tiny_task"}, {"name": "tiny_words"})},
            "forgetting": part,
        }
    )


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return compress(recipe(folder), str(folder / "store"), RESOURCES, name="forgetting", view="none")


def test_every_model_is_measured_on_three_kinds_of_text(folder: Path, run: Run) -> None:
    forgetting = run.to_json()["forgetting"]
    assert list(forgetting["nll"]) == MODELS
    num_kept = run.manifests["select"].summary["kept_distilled"]
    assert forgetting["num_rows"] == {"text": 8, "reference": num_kept, "distilled": num_kept}
    assert num_kept > 1
    assert set(forgetting["to_pruned"]) == {"sft"}
    table = pq.read_table(run.store.path(run.manifests["texts"].address) / files.ROWS)
    documents = row_documents(table, load_tokenizer(folder / "teacher"), 1024)
    places = {"teacher": folder / "teacher", "pruned": run.store.path(run.manifests["prune"].address)}
    places["sft"] = run.student_path("sft")
    expected = {name: response_nll(load_model(place, "float32"), documents) for name, place in places.items()}
    for name, rows in expected.items():
        assert forgetting["nll"][name]["text"]["value"] == pytest.approx(mean_nll(rows).value, rel=1e-4)
    difference = forgetting["nll"]["sft"]["text"]["value"] - forgetting["nll"]["teacher"]["text"]["value"]
    assert forgetting["to_teacher"]["sft"]["text"]["value"] == pytest.approx(difference, abs=1e-6)
    assert json.loads(json.dumps(forgetting)) == forgetting


def test_answers_are_compared_with_those_of_the_teacher(folder: Path, run: Run) -> None:
    similarities = run.to_json()["forgetting"]["likeness"]
    assert list(similarities) == MODELS[1:]
    embedder = load_embedder(folder / "embedder")
    answers = {}
    for model in ("teacher", "pruned"):
        path = run.store.path(run.manifests[f"evaluate:{model}"].address) / files.ITEMS
        rows = [row for row in pq.read_table(path).to_pylist() if row["task"] == "tiny_words"]
        answers[model] = [row["response"] for row in sorted(rows, key=lambda row: row["item"])]
    first_ND, second_ND = (embed(embedder, answers[model])[0] for model in ("teacher", "pruned"))
    assert similarities["pruned"]["num_answers"] == len(answers["teacher"]) == 8
    assert similarities["pruned"]["mean"]["value"] == pytest.approx(
        float((first_ND * second_ND).sum(1).mean()), abs=1e-4
    )


def test_the_page_tells_it(run: Run) -> None:
    page = run.report_path.read_text(encoding="utf-8")
    for text in ("Forgetting and shift", "held-out text", "Pruning made", "similarity", "in rows that students were"):
        assert text in page


def test_a_shorter_cut_measures_again_and_trains_nothing(folder: Path, run: Run) -> None:
    again = compress(recipe(folder, max_tokens=9), str(folder / "store"), RESOURCES, name="shorter", view="none")
    made = {stage["name"] for stage in again.stages() if not stage["skipped"]}
    assert made == {"report"} | {f"forget:{model}" for model in MODELS}
