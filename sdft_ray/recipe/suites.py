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
    # What models below a billion parameters can do at all: options compared by likelihood, without examples.
    "small": {
        "tasks": (
            _task("arc_easy", 0, "acc_norm"),
            _task("piqa", 0, "acc_norm"),
            _task("hellaswag", 0, "acc_norm"),
            _task("winogrande", 0, "acc"),
            _task("openbookqa", 0, "acc_norm"),
            _task("boolq", 0, "acc"),
        ),
        "limit": 500,
        "apply_chat_template": False,
    },
    # Answers that are written: a mean over options hides that a model can no longer write (arXiv:2602.01997).
    "generative": {
        "tasks": (
            _task("gsm8k", 5, "exact_match,strict-match"),
            _task("ifeval", 0, "prompt_level_strict_acc"),
        ),
        "limit": 500,
    },
    # The laboratory's tests; `include` names the folder that `sdft lab export` writes.
    "lab": {"tasks": tuple({"name": f"lab_{family}"} for family in _LAB)},
}
"""Name -> fields of `evaluate`."""


def with_suite(data: Any) -> Any:
    """Fields of `evaluate` with the suites that they name filled in; what is given beside them stands.

    `suite` is a name, a list of names, or null for none, as in a variant of a study whose recipe has one. `tasks`
    beside it come after those of the suites. Raises `ValueError` for an unknown suite, and for suites that differ in a
    field that is not given.
    """
    if not isinstance(data, dict) or "suite" not in data:
        return data
    given = {name: value for name, value in data.items() if name not in ("suite", "tasks")}
    named = data["suite"]
    asked = () if named is None else named if isinstance(named, (list, tuple)) else (named,)
    suites = {name: _suite(name) for name in asked}
    filled: dict[str, Any] = {}
    for field in dict.fromkeys(field for suite in suites.values() for field in suite if field != "tasks"):
        values = {name: suite.get(field, _DEFAULTS[field]) for name, suite in suites.items()}
        if field not in given and len(set(values.values())) > 1:
            differ = " and ".join(f"{name}: {value}" for name, value in values.items())
            raise ValueError(f"the suites differ in {field} ({differ}): give {field} beside them")
        filled[field] = next(iter(values.values()))
    tasks = [task for suite in suites.values() for task in suite["tasks"]]
    return {**filled, **given, "tasks": (*tasks, *(data.get("tasks") or ()))}


_DEFAULTS = {"limit": None, "apply_chat_template": True}
"""Of `evaluate`, for suites that leave a field out."""


def _suite(name: Any) -> dict[str, Any]:
    if name not in SUITES:
        near = difflib.get_close_matches(str(name), SUITES, 1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(SUITES)}"
        raise ValueError(f"no suite {name!r}; {known}")
    return SUITES[name]
