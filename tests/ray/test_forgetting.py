"""What was forgotten, on real Ray: all models on held-out text and on the seed set, answers beside the teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

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
from tests.support.worlds import LIGHT, make_world, world_data

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

SCRIPTED = {"generate": {"sampler": "scripted", "cpus": 0.5}, "train": {**LIGHT["train"], "num_workers": 1}}
RESOURCES = Resources.model_validate({**LIGHT, **SCRIPTED})
MODELS = ["teacher", "pruned", "sft"]
WORDS = {
    "task": "tiny_words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "one",
    "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses are not checked, so that rewrites of the scripted sampler are kept; one task asks for words."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_embedder(folder / "embedder", pooling="mean")
    (folder / "tasks/tiny_words.yaml").write_text(yaml.safe_dump(WORDS), encoding="utf-8")
    rows = [{"id": f"r{i}", "instruction": f"what is {i}", "reference": f"it is {i} and {2 * i}"} for i in range(12)]
    texts = [{"reference": f"Tom has {i} apples and gives {i % 3} to Ann."} for i in range(20)]
    for name, content in (("unchecked", rows), ("texts", texts)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def asked(folder: Path, **forgetting: object) -> Recipe:
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
    return compress(asked(folder), str(folder / "store"), RESOURCES, name="forgetting", view="none")


def test_every_model_is_measured_on_three_kinds_of_text(folder: Path, run: Run) -> None:
    told = run.to_json()["forgetting"]
    assert list(told["nll"]) == MODELS
    num_kept = run.manifests["select"].summary["kept_distilled"]
    assert told["num_rows"] == {"text": 8, "reference": num_kept, "distilled": num_kept}
    assert num_kept > 1
    assert set(told["to_pruned"]) == {"sft"}
    table = pq.read_table(run.store.path(run.manifests["texts"].address) / files.ROWS)
    documents = row_documents(table, load_tokenizer(folder / "teacher"), 1024)
    places = {"teacher": folder / "teacher", "pruned": run.store.path(run.manifests["prune"].address)}
    places["sft"] = run.student_path("sft")
    expected = {name: response_nll(load_model(place, "float32"), documents) for name, place in places.items()}
    for name, rows in expected.items():
        assert told["nll"][name]["text"]["value"] == pytest.approx(mean_nll(rows).value, rel=1e-4)
    difference = told["nll"]["sft"]["text"]["value"] - told["nll"]["teacher"]["text"]["value"]
    assert told["to_teacher"]["sft"]["text"]["value"] == pytest.approx(difference, abs=1e-6)
    assert json.loads(json.dumps(told)) == told


def test_answers_are_compared_with_those_of_the_teacher(folder: Path, run: Run) -> None:
    told = run.to_json()["forgetting"]["likeness"]
    assert list(told) == MODELS[1:]
    embedder = load_embedder(folder / "embedder")
    answers = {}
    for model in ("teacher", "pruned"):
        path = run.store.path(run.manifests[f"evaluate:{model}"].address) / files.ITEMS
        rows = [row for row in pq.read_table(path).to_pylist() if row["task"] == "tiny_words"]
        answers[model] = [row["response"] for row in sorted(rows, key=lambda row: row["item"])]
    first_ND, second_ND = (embed(embedder, answers[model])[0] for model in ("teacher", "pruned"))
    assert told["pruned"]["num_answers"] == len(answers["teacher"]) == 8
    assert told["pruned"]["mean"]["value"] == pytest.approx(float((first_ND * second_ND).sum(1).mean()), abs=1e-4)


def test_the_page_tells_it(run: Run) -> None:
    page = run.report_path.read_text(encoding="utf-8")
    for said in ("Forgetting and shift", "held-out text", "Pruning made", "similarity", "in rows that students were"):
        assert said in page


def test_a_shorter_cut_measures_again_and_trains_nothing(folder: Path, run: Run) -> None:
    again = compress(asked(folder, max_tokens=9), str(folder / "store"), RESOURCES, name="shorter", view="none")
    made = {stage["name"] for stage in again.stages() if not stage["skipped"]}
    assert made == {"report"} | {f"forget:{model}" for model in MODELS}
