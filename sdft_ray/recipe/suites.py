"""Suites: evaluations that go by a name. A recipe that names one holds its tasks, so it counts as those."""

from __future__ import annotations

import difflib
from typing import Any


def _task(name: str, num_fewshot: int, metric: str) -> dict[str, Any]:
    return {"name": name, "num_fewshot": num_fewshot, "metric": metric}


_LAB = ("word_problems", "facts", "myths", "ordering", "scripts", "pronouns", "lists")

SUITES: dict[str, dict[str, Any]] = {
    # Six tasks, shots and metrics of the Open LLM Leaderboard's first version, which the papers report.
    "open-llm-leaderboard-v1": {
        "tasks": (
            _task("arc_challenge", 25, "acc_norm"),
            _task("hellaswag", 10, "acc_norm"),
            _task("mmlu", 5, "acc"),
            _task("truthfulqa_mc2", 0, "acc"),
            _task("winogrande", 5, "acc"),
            _task("gsm8k", 5, "exact_match,strict-match"),
        ),
        "apply_chat_template": False,
    },
    # Minutes, not hours: whether a model is whole, not how good it is. Generation is in it.
    "quick": {
        "tasks": (
            _task("arc_easy", 0, "acc_norm"),
            _task("winogrande", 0, "acc"),
            _task("gsm8k", 5, "exact_match,strict-match"),
        ),
        "limit": 100,
        "apply_chat_template": False,
    },
    # The laboratory's tests; `include` names the folder that `sdft lab export` writes.
    "lab": {"tasks": tuple({"name": f"lab_{family}"} for family in _LAB)},
}
"""Name -> fields of `evaluate`."""


def with_suite(data: Any) -> Any:
    """Fields of `evaluate` with the suite that they name filled in; what is given beside it stands.

    Raises `ValueError` for an unknown suite, and for tasks beside one.
    """
    if not isinstance(data, dict) or "suite" not in data:
        return data
    given = {name: value for name, value in data.items() if name != "suite"}
    name = data["suite"]
    if name not in SUITES:
        near = difflib.get_close_matches(str(name), SUITES, 1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(SUITES)}"
        raise ValueError(f"no suite {name!r}; {known}")
    if "tasks" in given:
        raise ValueError(f"give suite {name} or tasks, not both")
    return {**SUITES[name], **given}
