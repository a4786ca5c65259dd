"""The seed stage without Ray: rows that overlap with test questions are left out, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sdft_ray.errors import DataError, EvaluationError
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.job import StageResult
from sdft_ray.stages.rows import NUM_EXAMPLES, make
from sdft_ray.store import files
from sdft_ray.store.store import Store
from tests.support.jobs import make_job
from tests.support.recipes import make_recipe
from tests.support.staged import output_of
from tests.unit.data.turns import turns

LONG = "a train leaves the old station at nine and reaches the far coast at noon how fast is it"
SHORT = "which of these four stones is the hardest one"
TEMPLATE = "Answer the following question about trains and stones and say nothing else but the answer to the question:"
TASK = f"""\
task: stones
dataset_path: json
dataset_kwargs: {{data_files: {{train: train.jsonl, test: test.jsonl}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{TEMPLATE} {{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
num_fewshot: 1
metric_list: [{{metric: acc}}]
"""
TRAIN = "this question is of the train split and so no test of the model that we compress here"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/stones.yaml").write_text(TASK, encoding="utf-8")
    for split, questions in (("test", [LONG, SHORT]), ("train", [TRAIN])):
        docs = [{"question": text, "choices": ["40 km/h", "opal"]} for text in questions]
        _write(tmp_path / f"tasks/{split}.jsonl", docs)
    return tmp_path


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _recipe(folder: Path, instructions: list[str], **settings: Any) -> Recipe:
    rows = [{"id": f"r{i}", "instruction": text, "reference": "fine"} for i, text in enumerate(instructions)]
    _write(folder / "rows.jsonl", rows)
    return make_recipe(
        folder,
        folder / "teacher",
        seed_set={"source": str(folder / "rows.jsonl"), **settings},
        evaluate={"tasks": [{"name": "stones"}], "include": str(folder / "tasks")},
    )


def _make(folder: Path, recipe: Recipe, step: str = "seed") -> tuple[StageResult, list[str]]:
    job = make_job(
        step=step,
        address=f"{step}/" + "1" * 16,
        store_url=Store(str(folder / "store")).url,
        recipe=recipe,
        resources=Resources(),
        teacher=ModelSource(directory=str(folder / "teacher")),
        inputs={},
        progress=lambda done, total, unit: None,
    )
    made = make(job)
    return made, pq.read_table(output_of(job) / files.ROWS)["example_id"].to_pylist()


def test_overlapping_rows_are_left_out_counted_and_named(folder: Path) -> None:
    asked = ["clean", f"Please: {LONG.title()}!", TRAIN, f"Tell me, {SHORT}, if any?", f"{TEMPLATE} clean too?"]
    made, kept = _make(folder, _recipe(folder, asked))
    assert kept == ["r0", "r2", "r4"], "the train split and the words of the template are no test question"
    assert made.summary["num_rows"] == 3
    assert made.summary["decontamination"] == {
        "ngram": 13,
        "num_rows": 5,
        "num_questions": 2,
        "num_contaminated": 2,
        "examples": ["r1", "r3"],
    }


def test_a_few_examples_are_enough(folder: Path) -> None:
    asked = [f"{LONG} {i}" for i in range(NUM_EXAMPLES + 3)]
    made, kept = _make(folder, _recipe(folder, [*asked, "clean"]))
    assert kept == [f"r{len(asked)}"]
    assert made.summary["decontamination"]["num_contaminated"] == len(asked)
    assert made.summary["decontamination"]["examples"] == [f"r{i}" for i in range(NUM_EXAMPLES)]


def test_none_is_counted_too(folder: Path) -> None:
    made, kept = _make(folder, _recipe(folder, ["clean", "clean too"]))
    assert len(kept) == 2
    assert made.summary["decontamination"]["num_contaminated"] == 0


def test_switched_off_all_rows_stay_and_no_task_is_read(folder: Path) -> None:
    (folder / "tasks/stones.yaml").unlink()
    made, kept = _make(folder, _recipe(folder, [LONG], decontaminate={"ngram": 0}))
    assert kept == ["r0"]
    assert made.summary["decontamination"] == {"ngram": 0, "num_rows": 1}


def test_no_row_left_is_an_error_with_a_next_step(folder: Path) -> None:
    with pytest.raises(DataError, match=r"all 2 rows .* 13 words .*ngram to 0"):
        _make(folder, _recipe(folder, [LONG, f"{LONG} please"]))


def test_tasks_without_data_are_an_error(folder: Path) -> None:
    (folder / "tasks/test.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"test\.jsonl"):
        _make(folder, _recipe(folder, ["clean"]))


def test_earlier_messages_of_a_conversation_are_compared_too(folder: Path) -> None:
    recipe = _recipe(folder, ["clean"])
    rows = [
        {"id": name, "messages": turns("user", first, "assistant", "fine", "user", "and now?", "assistant", "fine")}
        for name, first in (("a", LONG), ("b", SHORT), ("c", "clean"))
    ]
    _write(folder / "rows.jsonl", rows)
    made, kept = _make(folder, recipe)
    assert kept == ["c"]
    assert made.summary["decontamination"]["examples"] == ["a", "b"]


def test_how_rows_were_read_is_in_the_summary(folder: Path) -> None:
    recipe = _recipe(folder, ["clean"], decontaminate={"ngram": 0})
    _write(
        folder / "rows.jsonl",
        [
            {"id": "a", "messages": turns("user", "x", "assistant", "y", "user", "z", "assistant", "w")},
            {"id": "b", "messages": turns("user", "x", "assistant", "y")},
            {"id": "c", "messages": turns("user", "x")},
        ],
    )
    made, kept = _make(folder, recipe)
    assert kept == ["a", "b"]
    assert made.summary["reading"] == {
        "num_read": 3,
        "left_out": {"the conversation ends with a user message": 1},
        "num_earlier": 1,
        "layouts": {"`messages` holds the conversation": 3},
        "unused": [],
    }
    every = recipe.train.model_copy(update={"turns": "all"})
    made, kept = _make(folder, recipe.model_copy(update={"train": every}))
    assert kept == ["a#1", "a#2"]
    assert made.summary["reading"]["left_out"] == {
        "an earlier row has the same prompt and answer": 1,
        "the conversation ends with a user message": 1,
    }


def test_calibration_rows_all_stay(folder: Path) -> None:
    recipe = _recipe(folder, ["clean"])
    calibration = recipe.calibration.model_copy(update={"source": str(folder / "rows.jsonl")})
    _write(folder / "rows.jsonl", [{"id": "c", "instruction": LONG, "reference": "fine"}])
    made, kept = _make(folder, recipe.model_copy(update={"calibration": calibration}), "calibration")
    assert kept == ["c"]
    assert "decontamination" not in made.summary
