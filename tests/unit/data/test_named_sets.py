"""Sets of the hub by name: rows as they are there, and as we read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.data.hub import NAMED_SETS, named_records
from sdft_ray.data.messages import row_prompt
from sdft_ray.data.reading import Reading
from sdft_ray.data.sources import TWIN, read_tables
from tests.unit.data.turns import turns


def _openmath1(question: str, solution: str, expected: str, **changes: Any) -> dict[str, Any]:
    row = {
        "question": question,
        "generated_solution": solution,
        "expected_answer": expected,
        "predicted_answer": expected,
        "error_message": "<not_executed>",
        "is_correct": True,
        "generation_type": "without_reference_solution",
        "dataset": "gsm8k",
    }
    return row | changes


TRUE_ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "Ann has 2 + 1 figs?", "answer": "2+1=<<2+1=3>>3 figs\n#### 3"}],
    "dolly": [
        {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
        {"instruction": "Where?", "context": "Oslo.", "response": "There.", "category": "closed_qa"},
    ],
    "alpaca_cleaned": [
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Say nothing.", "input": "", "output": " "},
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
    ],
    "openmath_instruct_1": [
        _openmath1("What is 2 + 2?", "It is \\boxed{4}.", "4", dataset="gsm8k"),
        _openmath1("What is 2 + 2?", "It is \\boxed{5}.", "4", is_correct=False, predicted_answer="5"),
        _openmath1("Simplify.", "We get \\boxed{x^2}.", "x^2", dataset="math"),
    ],
    "openmath_instruct_2": [
        {
            "problem": "Half of 1?",
            "generated_solution": "So \\boxed{\\frac{1}{2}}",
            "expected_answer": "\\frac{1}{2}",
            "problem_source": "augmented_math",
        }
    ],
    "tulu3": [
        {"id": "a", "source": "ai2/x", "messages": turns("user", "Hi", "assistant", "Hello", "user", "Bye")},
        {
            "id": "b",
            "source": "ai2/y",
            "messages": turns("system", "Be brief.", "user", "Why?", "assistant", "So."),
        },
        {"id": "c", "source": "ai2/y", "messages": turns("assistant", "I begin.", "user", "Why?")},
        {"id": "d", "source": "ai2/y", "messages": []},
    ],
    "ultrachat": [
        {"prompt": "Q", "prompt_id": "f0", "messages": turns("user", "Q", "assistant", "A")},
        {"prompt": "Q", "prompt_id": "f1", "messages": turns("user", "Q", "assistant", " ")},
    ],
}
"""Rows with the columns that the hub's data sets have."""

OURS = {
    "gsm8k": [("gsm8k-0", "Ann has 2 + 1 figs?", "2+1=<<2+1=3>>3 figs\n#### 3", "number", "")],
    "dolly": [
        ("dolly-0", "Why?", "So.", "none", "open_qa"),
        ("dolly-1", "Where?\n\nOslo.", "There.", "none", "closed_qa"),
    ],
    "alpaca_cleaned": [
        ("alpaca_cleaned-0", "Sort.\n\nb a", "a b", "none", ""),
    ],
    "openmath_instruct_1": [
        ("openmath_instruct_1-0", "What is 2 + 2?", "It is \\boxed{4}.", "number", "gsm8k"),
        ("openmath_instruct_1-2", "Simplify.", "We get \\boxed{x^2}.", "text", "math"),
    ],
    "openmath_instruct_2": [
        ("openmath_instruct_2-0", "Half of 1?", "So \\boxed{\\frac{1}{2}}", "number", "augmented_math")
    ],
    "tulu3": [
        ("tulu3-1", "Why?", "So.", "none", "ai2/y"),
    ],
    "ultrachat": [("ultrachat-0", "Q", "A", "none", "")],
}


LEFT = {
    "alpaca_cleaned": {"the answer is empty": 1, TWIN: 1},
    "openmath_instruct_1": {"its solution is marked as wrong": 1},
    "tulu3": {"the conversation ends with a user message": 2, "the conversation is empty": 1},
    "ultrachat": {"the answer is empty": 1},
}
"""Reason -> rows that are left out."""


@pytest.mark.parametrize("name", NAMED_SETS)
def test_named_sets_read_their_true_columns(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "sdft_ray.data.sources.hub_records", lambda name, revision: named_records(name, iter(TRUE_ROWS[name]))
    )
    reading = Reading()
    rows = [row for table in read_tables(name, reading=reading) for row in table.to_pylist()]
    columns = ("example_id", "instruction", "reference_response", "answer_kind", "family")
    assert [tuple(row[column] for column in columns) for row in rows] == OURS[name]
    assert reading.left_out == LEFT.get(name, {})


def test_a_system_message_of_a_named_set_stays_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "sdft_ray.data.sources.hub_records", lambda name, revision: named_records(name, iter(TRUE_ROWS[name]))
    )
    (row,) = next(read_tables("tulu3")).to_pylist()
    assert row_prompt(row) == turns("system", "Be brief.", "user", "Why?")


@pytest.mark.slow
def test_hub_out_of_reach_says_what_to_do(tmp_path: Path):
    code = "from sdft_ray.data.sources import read_tables; list(read_tables('gsm8k'))"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: cannot download gsm8k (openai/gsm8k)" in last
    assert "download it first" in last
