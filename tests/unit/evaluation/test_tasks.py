"""Which texts of a task count as its questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_ray.evaluation.task_plans import TaskPlaces
from sdft_ray.evaluation.tasks import task_questions

HEAD = """\
dataset_path: json
dataset_kwargs: {data_files: {validation: rows.jsonl}}
validation_split: validation
output_type: multiple_choice
metric_list: [{metric: acc}]
"""
QUESTION = "Who is it that helped the other one today?"
GAP = "Ann thanked Eve because _ had been a great help all day."
OPTIONS = [GAP.replace("_", name) for name in ("Ann", "Eve")]
ROW = {"question": f"{QUESTION} ", "topic": "help", "sentence": GAP, "name": "Ann", "empty": " ", "choices": OPTIONS}
FORMS = {
    "fields, without the template's words": (
        "doc_to_text: 'Read this. {{question.strip()}} Topic: {{topic}}.'",
        (QUESTION, "help"),
    ),
    "the whole where no field is long enough": (
        "doc_to_text: 'Read this. {{topic}} and {{name}}?'",
        ("help", "Ann", "Read this. help and Ann?"),
    ),
    "options that are questions, and the field that the task names": (
        "doc_to_text: '1'\ndoc_to_decontamination_query: sentence",
        (*OPTIONS, GAP),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_texts_of_a_question(form: str, tmp_path: Path) -> None:
    text, expected = FORMS[form]
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(ROW) + "\n"), encoding="utf-8")
    task = f"task: t\n{HEAD}{text}\ndoc_to_choice: choices\ndoc_to_target: 1\n"
    (tmp_path / "t.yaml").write_text(task, encoding="utf-8")
    found = list(task_questions(["t"], TaskPlaces(tmp_path)))
    assert len(found) == 2
    assert tuple(text.strip() for text in found[0]) == expected
