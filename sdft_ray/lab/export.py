"""Write the laboratory to a folder: teacher, seed sets, calibration, tests and the quickstart recipe.

Everything comes from fixed seeds, so two exports are equal byte for byte. Nothing here needs torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdft_ray.lab import sets
from sdft_ray.lab.families import FAMILIES, Item

TEACHER = Path(__file__).parent / "teacher"
"""The teacher that is part of the package: an ordinary Hugging Face model directory."""

RECORD = "training_record.json"
QUICKSTART = Path(__file__).parent / "quickstart.yaml"
GRID = QUICKSTART.with_name("grid.yaml")
STUDY = QUICKSTART.with_name("study.yaml")
TASK_PREFIX = "lab_"
"""Prefix of lm-eval task names: `lab_facts` has the test items of the family `facts`."""
HELDOUT_PREFIX = "heldout_"
"""`heldout_facts` has held-out training items, on which learning rates are chosen."""

_SEED_FILES = {
    "seed/word_problems.jsonl": "word_problems",
    "seed/mixed.jsonl": "mixed",
    "calibration.jsonl": "calibration",
    "heldout.jsonl": "heldout",
    "heldout_word_problems.jsonl": "heldout_word_problems",
}
_STUDY_FILES = {
    "seed/word_problems_large.jsonl": "word_problems_large",
    "seed/mixed_large.jsonl": "mixed_large",
}
_FILTERS = {
    "number": r"(-?\d+)",
    "list": r"(\[[^\[\]]*\])",
}
"""Regular expressions for the answer in a generated text; the last match counts."""


def export(directory: Path, *, study: bool = False) -> Path:
    """Write the laboratory into `directory` (created if missing) and return it; equal files are not rewritten.

    Layout: `teacher/`, `seed/{word_problems,mixed}.jsonl`, `calibration.jsonl`, `heldout*.jsonl`,
    `tasks/{lab,heldout}_*.yaml`, `tasks/data/*.jsonl`, `gates.json`, `quickstart.yaml`, `grid.yaml`; with `study` also
    `study.yaml` and its seed sets of 4,550 rows, `seed/{word_problems,mixed}_large.jsonl`.
    """
    directory = Path(directory)
    for source in sorted(path for path in TEACHER.iterdir() if path.is_file()):
        _copy(source, directory / "teacher" / source.name)
    for name, rows in (_SEED_FILES | (_STUDY_FILES if study else {})).items():
        _write(directory / name, _jsonl(sets.seed_rows(rows)))
    for family in FAMILIES:
        _write_task(directory / "tasks", TASK_PREFIX + family, sets.test_items(family))
        _write_task(directory / "tasks", HELDOUT_PREFIX + family, sets.heldout_items(family))
    record = json.loads((TEACHER / RECORD).read_text(encoding="utf-8"))
    _write(directory / "gates.json", json.dumps(record["gates"], indent=2) + "\n")
    for recipe in (QUICKSTART, GRID, *([STUDY] if study else [])):
        _copy(recipe, directory / recipe.name)
    return directory


def _write_task(directory: Path, task: str, items: Sequence[Item]) -> None:
    _write(directory / "data" / f"{task}.jsonl", _jsonl(_test_rows(task, items)))
    _write(directory / f"{task}.yaml", yaml.safe_dump(_task(task, items[0]), sort_keys=False))


def _test_rows(task: str, items: Iterable[Item]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        row: dict[str, Any] = {"id": f"{task}-{index:03d}", "question": item.exam}
        if item.options:
            row |= {"choices": list(item.options), "gold": item.gold}
        else:
            row |= {"answer": item.answer}
        rows.append(row)
    return rows


def _task(task: str, example: Item) -> dict[str, Any]:
    """The content of an lm-eval task file; `data_files` is relative to the folder of the file."""
    head = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"data/{task}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tail = {"num_fewshot": 0, "metadata": {"version": 1.0}}
    if example.options:
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        body: dict[str, Any] = {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [metric],
        }
        return head | body | tail
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    extract = {"function": "regex", "regex_pattern": _FILTERS[example.answer_kind], "group_select": -1}
    body = {
        "output_type": "generate_until",
        # The field, not a template: lm-eval would read a rendered "[5]" as a Python list.
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 128},
        "filter_list": [{"name": "last-answer", "filter": [extract, {"function": "take_first"}]}],
        "metric_list": [metric],
    }
    return head | body | tail


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and target.read_bytes() == source.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
