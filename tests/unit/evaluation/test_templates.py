"""Compiled templates against lm-eval's own rendering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft_ray.evaluation.task_plans import TaskPlaces
from sdft_ray.evaluation.tasks import leaf_tasks, load_tasks
from sdft_ray.evaluation.templates import compile_templates

TASK: dict[str, Any] = {
    "task": "t",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "rows.jsonl", "validation": "rows.jsonl"}},
    "training_split": "train",
    "validation_split": "validation",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc"}],
    "doc_to_choice": "options",
}
ROWS = [
    {"question": f" Who counted {i}? ", "options": ["Ann", f"Eve {i}"], "gold": i % 2, "text": f"[{i}] or [x"}
    for i in range(6)
]
WITHOUT_OPTIONS = {"output_type": "generate_until", "doc_to_choice": None, "metric_list": [{"metric": "exact_match"}]}
FORMS: dict[str, dict[str, Any]] = {
    "columns": {"doc_to_text": "question", "doc_to_target": "gold"},
    "templates": {
        "doc_to_text": "Q: {{question.strip()}}\nA:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
    },
    "lists": {
        "doc_to_text": "{% for option in options %}{{option}}\n{% endfor %}",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": 1,
    },
    "options that are the questions": {"doc_to_text": "{{gold}}", "doc_to_target": "{{options[gold]}}"},
    "a target that looks like a list": {**WITHOUT_OPTIONS, "doc_to_text": "{{question}}", "doc_to_target": "{{text}}"},
    "several targets": {**WITHOUT_OPTIONS, "doc_to_text": "{{3}}", "doc_to_target": "{{options}}"},
    "few-shot examples with a template of their own": {
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "fewshot_config": {"doc_to_text": "Example: {{question}}", "doc_to_target": "{{gold}}"},
    },
    "a filter of lm-eval's": {
        "doc_to_text": "{{question | regex_replace('Who', 'What')}}",
        "doc_to_target": "{{gold}}",
    },
}


def loaded(folder: Path) -> Any:
    (task,) = leaf_tasks(load_tasks(["t"], TaskPlaces(folder))["t"])
    task.set_fewshot_seed(0)
    return task


def everything_of(task: Any) -> list[Any]:
    """All that lm-eval takes from the templates of a task."""
    has_choices = task.config.doc_to_choice is not None
    return [
        (
            task.doc_to_text(document),
            task.doc_to_target(document),
            task.doc_to_choice(document) if has_choices else None,
            task.fewshot_context(document, num_fewshot=2),
        )
        for document in task.eval_docs
    ]


@pytest.mark.parametrize("form", FORMS)
def test_compiled_templates_render_as_in_lm_eval(form: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**TASK, **FORMS[form]}), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    expected = everything_of(loaded(tmp_path))
    task = loaded(tmp_path)
    compile_templates(task)
    assert everything_of(task) == expected
    for config in (task.config, task.fewshot_cfg):
        fields = [config.doc_to_text, config.doc_to_target, config.doc_to_choice]
        assert not [field for field in fields if isinstance(field, str) and field not in task.features]
