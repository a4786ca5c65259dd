"""lm-eval reads the laboratory's task files as they are meant: the right answer gets full marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdft_ray.evaluation.task_plans import TaskPlaces
from sdft_ray.evaluation.tasks import load_tasks
from sdft_ray.lab import sets
from sdft_ray.lab.export import HELDOUT_PREFIX, TASK_PREFIX, export
from sdft_ray.lab.families import FAMILIES


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("prefix", [TASK_PREFIX, HELDOUT_PREFIX])
@pytest.mark.parametrize("family", [name for name in FAMILIES if not sets.test_items(name)[0].options])
def test_right_answers_are_right(laboratory: Path, prefix: str, family: str) -> None:
    name = prefix + family
    (task,) = load_tasks([name], TaskPlaces(laboratory / "tasks"))[name]
    lm_eval_task: Any = task
    docs = list(lm_eval_task.test_docs())
    assert docs
    for doc in docs:
        assert lm_eval_task.doc_to_target(doc) == doc["answer"]
        assert lm_eval_task.process_results(doc, [doc["answer"]])["exact_match"] == 1, doc
        assert lm_eval_task.process_results(doc, ["[none]"])["exact_match"] == 0, doc
