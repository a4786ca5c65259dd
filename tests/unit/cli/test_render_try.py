"""What `sdft try` prints."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from sdft_ray.cli.render_try import advice, print_rehearsal, rehearsal_text
from sdft_ray.generation.trial import Distance, recommend, trial_of
from sdft_ray.pipeline.rehearsal import Rehearsal, StepTime
from sdft_ray.statistics.estimate import Estimate


def rows(marks: str) -> list[dict[str, Any]]:
    """`+` is kept, any other mark is not."""
    return [
        {
            "example_id": f"row-{index}", "instruction": "How many clips does [bold]Natalia[/] sell?",
            "reference_response": "She sells 48. #### 48", "distilled_response": f"She sells {mark} " * 4,
            "reason": "kept" if mark == "+" else "no_answer",
        }
        for index, mark in enumerate(marks)
    ]  # fmt: skip


def rehearsal(own_words: str, detailed: str, template: str = "own_words_detailed") -> Rehearsal:
    distance = Distance(4, Estimate(1.31, 0.05), Estimate(0.42, 0.03), Estimate(0.89, 0.04))
    trials = (
        replace(trial_of("own_words", rows(own_words), 120.0, 80.0), distance=distance),
        trial_of("own_words_detailed", rows(detailed), 300.0, 90.0),
    )
    steps = (StepTime("seed", 0.0, "done"), StepTime("generate", 754.0), StepTime("rate", None, "not estimated"))
    ranked = tuple(sorted(trials, key=lambda trial: -trial.num_own))
    return Rehearsal(
        "r", template, len(own_words), 7473, ranked, recommend(ranked, template), 271.0, steps, 4000.0, 95.0
    )


def printed(found: Rehearsal, **options: Any) -> str:
    stream = io.StringIO()
    print_rehearsal(found, Console(file=stream, highlight=False, **options))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_it_is_readable_in_a_terminal_and_plain_in_a_pipe(width: int) -> None:
    found = rehearsal("++++++--", "--------")
    text = printed(found, width=width)
    assert "\x1b" not in text
    unwrapped = ("The run takes", "32", "8 of 7,473")
    assert (
        max(len(line) for line in text.splitlines() if not line.startswith(unwrapped) and "keeps" not in line) <= width
    )
    for part in (
        "8 of 7,473 rows",
        "own_words_detailed *",
        "41 to 93 %",
        "1.31 ± 0.05",
        "0.42 ± 0.03",
        "12 min 34 s",
    ):
        assert part in text
    assert "2 no_answer" in text and "the rewrite gives none" in text  # noqa: PT018
    assert "[bold]Natalia[/]" in text, "data is no markup"
    assert "at least 1 h 06 min" in text, "a step without a time makes it a lower bound"
    assert "\x1b" in printed(found, width=width, force_terminal=True)


def test_the_advice_is_a_line_for_the_recipe_where_the_difference_can_be_told() -> None:
    told = advice(rehearsal("++++++++", "--------"))
    assert (
        "own_words keeps most: 8 of 8 rows (68 to 100 %), for 0 of the recipe's own_words_detailed (p = 0.008)" in told
    )
    assert told.endswith("generate: {template: own_words}")


def test_bare_answers_are_warned_of() -> None:
    found = rehearsal("++++++++", "--------")
    short = replace(found, templates=(replace(found.templates[0], length=0.3), *found.templates[1:]))
    assert "bare answers" in advice(short)
    assert "30 % of the words" in advice(short)
    assert "bare answers" not in advice(found)


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    told = advice(rehearsal("+++-----", "--------"))
    assert "may be chance: keep the recipe as it is, or try --rows 64" in told
    assert "generate:" not in told


def test_the_recipes_own_template_is_confirmed() -> None:
    assert advice(rehearsal("++++++++", "--------", "own_words")).startswith(
        "The recipe's template, own_words, keeps most"
    )


def test_where_nothing_is_kept_no_template_is_recommended() -> None:
    told = advice(rehearsal("--------", "--------"))
    assert "generate.max_tokens" in told and "answer_kind" in told  # noqa: PT018


def test_json_has_everything_but_the_rows_one_by_one() -> None:
    data = json.loads(rehearsal_text(rehearsal("++++++--", "--------")))
    assert data["templates"][0]["own"] == {
        "value": 0.75,
        "low": pytest.approx(0.409, abs=1e-3),
        "high": pytest.approx(0.929, abs=1e-3),
        "level": 0.95,
    }
    assert data["templates"][0]["distance"]["rewrite"] == {"value": 0.42, "stderr": 0.03}
    assert {"advice", "total_s", "steps", "tokens_per_s"} <= set(data)
    assert "is_own" not in data["templates"][0]
