"""A task whose scores need files that are not here is refused before anything is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.task_needs import check_needs
from sdft_ray.evaluation.task_plans import TaskPlaces, tasks_of
from sdft_ray.evaluation.tasks import load_tasks

nltk = pytest.importorskip("nltk")


@pytest.fixture
def places(tmp_path: Path) -> TaskPlaces:
    """IFEval's data, a row."""
    (tmp_path / "ifeval").mkdir()
    row = {"key": 1, "prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "ifeval" / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return TaskPlaces(data=tmp_path)


def test_ifeval_without_its_word_lists(places: TaskPlaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(EvaluationError, match="'ifeval' needs nltk's punkt_tab, which is not on this machine") as error:
        load_tasks(["ifeval"], places)
    assert "python -m nltk.downloader punkt_tab" in str(error.value)


def test_ifeval_with_them(places: TaskPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    (plan,) = tasks_of(places.library().plans(["ifeval"])["ifeval"])
    check_needs(plan, places.origin)


def test_tasks_that_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    places = TaskPlaces()
    for plan in tasks_of(places.library().plans(["gsm8k", "hellaswag"])["hellaswag"]):
        check_needs(plan, places.origin)


def test_a_module_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    (tmp_path / "helpers.py").write_text("import no_such_package\n\ndef asked(doc): ...\n", encoding="utf-8")
    (tmp_path / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: !function helpers.asked\ndoc_to_target: answer\n",
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError, match="'t' needs the Python module no_such_package"):
        load_tasks(["t"], TaskPlaces(tmp_path))
