"""Models that `sdft compare` does not compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.analysis.compare import compare
from sdft_ray.errors import EvaluationError
from sdft_ray.store.store import Store
from tests.unit.report.made_up_comparison import (
    GENERATED,
    evaluated,
    make_values,
    pair_of,
    rows_of,
    scores_of,
    write_run,
)

TEACHER = make_values(40)["teacher"]
LESS = {task: values for task, values in TEACHER.items() if task != "mmlu"}
SHORT = {task: values[:39] for task, values in TEACHER.items()}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (lambda s: evaluated(s, "b", "y", scores_of(LESS), None), "a/x was evaluated on mmlu, b/y was not"),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER, mmlu={"metric": "acc_norm"}), None),
            "mmlu: metric: acc and acc_norm",
        ),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER, gsm8k={"filter": "flexible"}), None),
            "gsm8k: filter: strict-match and flexible",
        ),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER, mmlu={"num_fewshot": 0}), None),
            "mmlu: num_fewshot: 5 and 0",
        ),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER), None, asked={"limit": 40}),
            "limit: default and 40",
        ),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER), None, asked={"apply_chat_template": False}),
            "apply_chat_template: default and False",
        ),
        (lambda s: evaluated(s, "b", "y", scores_of(SHORT), None), "gsm8k: number of items: 40 and 39"),
        (
            lambda s: evaluated(
                s, "b", "y", scores_of(TEACHER, ifeval={"items": {f"x{i}": 1.0 for i in range(40)}}), None
            ),
            "evaluated on different items of ifeval",
        ),
        (
            lambda s: evaluated(s, "b", "y", replace(scores_of(TEACHER), harness="0.4.14"), None),
            "a/x was evaluated with lm-eval 0.4.13, b/y with 0.4.14",
        ),
        (
            lambda s: evaluated(s, "b", "y", replace(scores_of(TEACHER), harness=""), None, lm_eval="0.4.12"),
            "a/x was evaluated with lm-eval 0.4.13, b/y with 0.4.12",
        ),
        (
            lambda s: evaluated(s, "b", "y", scores_of(TEACHER), rows_of(TEACHER, target="42")),
            "item 0 of gsm8k has different targets",
        ),
    ],
)
def test_models_that_were_asked_otherwise_are_refused(
    tmp_path: Path, second: Callable[[Store], Any], told: str
) -> None:
    store = pair_of(tmp_path, second)
    with pytest.raises(EvaluationError, match=told) as raised:
        compare(store, ["a/x", "b/y"])
    assert raised.value.hint
    assert "\n" not in str(raised.value)


def test_unknown_versions_and_seeds_that_draw_nothing_do_not_stop_a_comparison(tmp_path: Path) -> None:
    values = {task: TEACHER[task] for task in GENERATED}
    store = Store(str(tmp_path))
    one = evaluated(store, "a", "x", replace(scores_of(values), harness=""), None, lm_eval="")
    write_run(store, "a", [one])
    write_run(store, "b", [evaluated(store, "b", "y", scores_of(values), None, asked={"seed": 3})])
    assert compare(store, ["a/x", "b/y"]).harness == "0.4.13"
