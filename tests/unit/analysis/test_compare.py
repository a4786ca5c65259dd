"""`sdft compare`: names, figures against naive counts, and examples."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from sdft_ray.analysis.compare import compare
from sdft_ray.cli import app as cli
from sdft_ray.errors import EvaluationError, StoreError, UserError
from sdft_ray.report.comparison.gather import Figures, rejected_by_holm
from sdft_ray.report.comparison.model import Comparison
from sdft_ray.report.comparison.words import details, verdict
from sdft_ray.statistics.paired import paired_bootstrap
from sdft_ray.statistics.scores import GenerationStats
from sdft_ray.store.store import Store
from tests.unit.report.made_up_comparison import (
    CHOSEN,
    GENERATED,
    evaluated,
    make_store,
    make_values,
    pair_of,
    rows_of,
    scores_of,
    write_run,
)

VALUES = make_values(40)
TEACHER, PRUNED, SDFT = (VALUES[name] for name in ("teacher", "pruned", "sdft"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("comparison") / "store")


@pytest.fixture(scope="module")
def found(store: Store) -> Comparison:
    return compare(store, ["small/teacher", "small/pruned", "small/sdft"], num_examples=5)


# --- figures ------------------------------------------------------------------------------------------------


def test_scores_changes_and_flips_are_those_of_a_naive_count(found: Comparison) -> None:
    assert [task.name for task in found.tasks] == [*GENERATED, *CHOSEN]
    for task in found.tasks:
        for place, own in enumerate((PRUNED, SDFT)):
            pairs = list(zip(TEACHER[task.name], own[task.name], strict=True))
            change = task.changes[place]
            assert change.value == pytest.approx(statistics.fmean(b - a for a, b in pairs))
            flips = change.flips
            assert flips is not None
            lost, won = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
            counts = (flips.num_both, flips.num_only_baseline, flips.num_only_other, flips.num_neither)
            assert counts == (pairs.count((1.0, 1.0)), lost, won, pairs.count((0.0, 0.0)))
            assert flips.p_value == pytest.approx(binomtest(lost, lost + won).pvalue if lost + won else 1.0)
        assert task.scores[0].value == pytest.approx(statistics.fmean(TEACHER[task.name]))
        assert task.num_items == 40


def test_intervals_are_those_of_the_paired_bootstrap(found: Comparison) -> None:
    teacher, sdft = scores_of(TEACHER), scores_of(SDFT)
    assert found.overall is not None
    for row in (found.tasks[0], found.tasks[-1], *found.means, found.overall):
        expected = paired_bootstrap(teacher, sdft, tasks=row.tasks)
        assert (row.changes[1].low, row.changes[1].high) == (expected.low, expected.high)
        assert expected.value == pytest.approx(row.changes[1].value)


def test_generation_and_multiple_choice_have_means_of_their_own(found: Comparison) -> None:
    assert {row.name: row.tasks for row in found.means} == {"generation": GENERATED, "choice": CHOSEN}
    for row in found.means:
        for own, score in zip((TEACHER, PRUNED, SDFT), row.scores, strict=True):
            means = [statistics.fmean(own[task]) for task in row.tasks]
            errors = [statistics.stdev(own[task]) / math.sqrt(40) for task in row.tasks]
            assert score.value == pytest.approx(sum(means) / len(means))
            assert score.stderr == pytest.approx(sum(error**2 for error in errors) ** 0.5 / len(errors))
    assert found.overall is not None
    assert found.overall.tasks == (*GENERATED, *CHOSEN)
    parted = [task for row in found.capabilities for task in row.tasks]
    assert sorted(parted) == sorted(found.overall.tasks)


def test_generation_is_told_by_how_answers_were_made() -> None:
    # The chance level of a task with a scoring of its own is unknown.
    told = {"chance": None}
    written = {**told, "written": GenerationStats(40, 10.0, 0.0, 0.0, 0.0)}
    values = {"a": TEACHER["gsm8k"], "b": TEACHER["mmlu"]}
    scores = scores_of(values, a=written, b=told)
    kinds = [task.kind for task in Figures([scores, scores], [{}, {}], 0.95).tasks()]
    assert kinds == ["generation", "choice"]


def test_holm_against_its_adjusted_p_values() -> None:
    generator = random.Random(0)
    for _ in range(200):
        p_values = {i: generator.random() ** 4 for i in range(generator.randint(1, 9))}
        order = sorted(p_values.values())
        adjusted = {
            i: max(min(1.0, (len(order) - k) * q) for k, q in enumerate(order) if q <= p) for i, p in p_values.items()
        }
        assert rejected_by_holm(p_values, 0.05) == {i for i, p in adjusted.items() if p <= 0.05}
    assert rejected_by_holm({0: 0.03, 1: 0.04}, 0.05) == set()
    assert rejected_by_holm({}, 0.05) == set()


def test_tasks_are_clear_by_holm_and_means_by_their_interval(found: Comparison) -> None:
    assert found.overall is not None
    for place in (0, 1):
        changes = {task.name: task.changes[place] for task in found.tasks}
        p_values = [change.flips.p_value if change.flips else 1.0 for change in changes.values()]
        fallen = rejected_by_holm(dict(enumerate(p_values)), 0.05)
        assert [change.is_clear for change in changes.values()] == [i in fallen for i in range(7)]
        for row in (*found.means, found.overall):
            low, high = row.changes[place].low, row.changes[place].high
            assert low is not None
            assert high is not None
            assert row.changes[place].is_clear == (not low <= 0 <= high)
    assert all(task.changes[0].is_clear for task in found.tasks if task.name in GENERATED)


def test_answers_of_generation_tasks_add_up(found: Comparison) -> None:
    for task in found.tasks:
        if task.name in CHOSEN:
            assert task.answers == (None, None, None)
            continue
        for own, answers in zip((TEACHER, PRUNED, SDFT), task.answers, strict=True):
            assert answers is not None
            lost = [item for item, value in enumerate(own[task.name]) if value == 0 and item % 5 == 0]
            assert answers.num_right == sum(own[task.name])
            assert answers.num_no_answer == len(lost)
            assert answers.num_wrong == 40 - answers.num_right - len(lost)
            assert answers.num_truncated == sum(item % 2 == 0 for item in lost)
            assert answers.mean_tokens == pytest.approx(statistics.fmean(20 + item % 7 for item in range(40)))


# --- examples -----------------------------------------------------------------------------------------------


def test_examples_are_items_that_changed_sides_with_both_answers(found: Comparison) -> None:
    rows = {
        name: {(r["task"], r["item"]): r for r in rows_of(own)}
        for name, own in (("teacher", TEACHER), ("pruned", PRUNED), ("sdft", SDFT))
    }
    assert found.examples
    for example in found.examples:
        key = (example.task, example.item)
        before, after = rows["teacher"][key], rows[example.other][key]
        assert (before["value"], after["value"]) == ((0.0, 1.0) if example.won else (1.0, 0.0))
        assert (example.prompt, example.target) == (before["prompt"], before["target"])
        for row, response in ((before, example.before), (after, example.after)):
            assert (row["response"], row["filtered"]) == (response.text, response.filtered)
            assert (bool(row["truncated"]), bool(row["no_answer"])) == (response.truncated, response.no_answer)


def test_examples_take_turns_between_tasks(store: Store, found: Comparison) -> None:
    for other, own in (("pruned", PRUNED), ("sdft", SDFT)):
        for won in (False, True):
            chosen = [e.task for e in found.examples if e.other == other and e.won == won]
            wanted = (0.0, 1.0) if won else (1.0, 0.0)
            num = {t: list(zip(TEACHER[t], own[t], strict=True)).count(wanted) for t in TEACHER}
            assert len(chosen) == min(5, sum(num.values()))
            turns: list[str] = []
            while len(turns) < len(chosen):
                turns += [task for task in num if turns.count(task) < num[task]]
            expected = turns[: len(chosen)]
            assert sorted(chosen) == sorted(expected)
    again = compare(store, ["small/teacher", "small/pruned", "small/sdft"], num_examples=5)
    assert again.examples == found.examples
    assert compare(store, ["small/teacher", "small/sdft"], num_examples=0).examples == ()


def test_models_of_before_answers_were_kept_have_scores_alone(store: Store) -> None:
    found = compare(store, ["small/teacher", "other/old"])
    assert found.examples == ()
    assert found.without_answers == ("other/old",)
    flips = found.tasks[0].changes[0].flips
    assert flips is not None
    assert flips.num_both > 0
    answers = found.tasks[0].answers
    assert answers[0] is not None
    assert answers[1] is None


# --- names --------------------------------------------------------------------------------------------------


def test_a_run_alone_stands_for_all_its_models_teacher_first(store: Store) -> None:
    assert [model.name for model in compare(store, ["small"]).models] == ["teacher", "pruned", "sft", "sdft"]
    assert [model.role for model in compare(store, ["other"]).models] == ["teacher", "old"]


def test_a_run_beside_others_stands_for_its_best_student(store: Store) -> None:
    found = compare(store, ["small/teacher", "small", "other"])
    assert [model.name for model in found.models] == ["small/teacher", "small/sdft", "other/old"]


@pytest.mark.parametrize(
    ("names", "kind", "told"),
    [
        (["smal/teacher", "small"], StoreError, "no run named 'smal' .*did you mean small"),
        (["zzz", "small"], StoreError, "no run named 'zzz' .*runs here: other, small"),
        (["small:teacher", "small"], StoreError, "did you mean small/MODEL"),
        (["small/techer", "small"], StoreError, "no evaluated model 'techer' .*teacher, pruned, sft, sdft"),
        (["small/sdft"], EvaluationError, "at least two models .*small/sdft"),
        (["small/sdft", "small"], EvaluationError, "small/sdft is given twice"),
    ],
)
def test_names_that_mean_nothing(store: Store, names: list[str], kind: type[UserError], told: str) -> None:
    with pytest.raises(kind, match=told) as raised:
        compare(store, names)
    assert raised.value.hint


def test_a_run_without_students_wants_a_model_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    models = [evaluated(store, "bare", model, scores_of(TEACHER), None) for model in ("teacher", "pruned")]
    write_run(store, "bare", models)
    with pytest.raises(StoreError, match="bare/MODEL: teacher, pruned"):
        compare(store, ["bare", "bare/teacher"])


# --- other metrics ------------------------------------------------------------------------------------------


def graded(folder: Path) -> Comparison:
    """A perplexity over the whole set, a graded metric, and a task of a single item with an error of NaN."""
    parts: dict[str, Mapping[str, Any]] = {
        "wikitext": {"value": 12.5, "stderr": None, "higher_is_better": False, "items": {}, "chance": None},
        "rouge": {"chance": 0.0},
        "gsm8k": {"stderr": math.nan},
    }
    first = {"wikitext": [0.0, 1.0], "rouge": [0.25, 0.5, 1.0], "gsm8k": [1.0, 1.0]}
    second = {"wikitext": [0.0, 1.0], "rouge": [0.25, 0.75, 0.5], "gsm8k": [1.0, 0.0]}
    store = Store(str(folder))
    later = {**parts, "wikitext": {**parts["wikitext"], "value": 14.0}}
    write_run(store, "a", [evaluated(store, "a", "x", scores_of(first, **parts), rows_of(first))])
    write_run(store, "b", [evaluated(store, "b", "y", scores_of(second, **later), rows_of(second))])
    return compare(store, ["a/x", "b/y"])


def test_metrics_that_are_no_share_stand_for_themselves(tmp_path: Path) -> None:
    found = graded(tmp_path)
    wikitext, rouge, gsm8k = found.tasks
    assert [task.kind for task in found.tasks] == ["other", "generation", "generation"]
    assert wikitext.changes[0].value == pytest.approx(1.5)
    assert wikitext.changes[0].low is None
    assert wikitext.changes[0].flips is None
    assert rouge.changes[0].flips is None
    assert rouge.changes[0].low is not None
    assert gsm8k.scores[0].stderr is None
    assert found.overall is not None
    assert found.overall.tasks == ("rouge", "gsm8k")
    assert {example.task for example in found.examples} == {"gsm8k"}


def test_scores_that_are_not_the_mean_of_their_items_have_no_interval(tmp_path: Path) -> None:
    store = pair_of(tmp_path, lambda s: evaluated(s, "b", "y", scores_of(SDFT, mmlu={"value": 0.123}), None))
    changes = {task.name: task.changes[0] for task in compare(store, ["a/x", "b/y"]).tasks}
    assert changes["mmlu"].low is None
    assert changes["mmlu"].value == pytest.approx(0.123 - statistics.fmean(TEACHER["mmlu"]))
    assert changes["gsm8k"].low is not None


# --- words, JSON, command -----------------------------------------------------------------------------------


def test_the_verdict_says_how_far_and_whether_it_can_be_told(found: Comparison) -> None:
    assert found.overall is not None
    text = "".join(part.text for part in verdict(found)).replace("\u202f", " ")
    gap = -100 * found.overall.changes[0].value
    assert text.startswith(f"On the mean of 7 tasks, pruned is {gap:.1f} points below teacher; sdft ")
    assert not found.overall.changes[1].is_clear
    assert text.endswith("; sdft cannot be told apart from it.")
    lost = sum(task.changes[0].flips.num_only_baseline for task in found.tasks if task.changes[0].flips)
    assert f"{lost} items that teacher gets right went wrong" in details(found, 0)


def test_two_equal_models_cannot_be_told_apart(tmp_path: Path) -> None:
    store = pair_of(tmp_path, lambda s: evaluated(s, "b", "y", scores_of(TEACHER), rows_of(TEACHER)))
    found = compare(store, ["a/x", "b/y"])
    assert "cannot be told apart" in "".join(part.text for part in verdict(found))
    assert "clearly different on no single task" in details(found, 0)
    assert found.examples == ()


def run_command(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["compare", *arguments])


def test_json_is_whole_and_without_nan(store: Store, tmp_path: Path) -> None:
    done = run_command("small/teacher", "small/sdft", "--store", store.url, "--json", "--examples", "1")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout, parse_constant=pytest.fail)
    assert [model["name"] for model in data["models"]] == ["teacher", "sdft"]
    assert len(data["tasks"]) == 7
    assert {example["won"] for example in data["examples"]} == {True, False}
    json.loads(graded(tmp_path).to_json(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_a_page(store: Store, tmp_path: Path) -> None:
    done = run_command("small", "--store", store.url)
    assert done.exit_code == 0, done.output
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    value = 100 * statistics.fmean(TEACHER["gsm8k"])
    change = 100 * statistics.fmean(PRUNED["gsm8k"]) - value
    assert f"{value:.1f} ±" in rows["gsm8k"]
    assert f"{change:.1f}".replace("-", "\u2212") in rows["gsm8k"]
    assert "mean, multiple choice" in rows
    assert "--html" in done.stdout
    page = tmp_path / "page.html"
    done = run_command("small", "--store", store.url, "--html", str(page))
    assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(page) in done.stdout.replace("\n", "")
    refused = run_command("small", "--store", store.url, "--html", str(tmp_path / "nowhere" / "page.html"))
    assert isinstance(refused.exception, StoreError)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_longer_than_the_terminal(store: Store, columns: int) -> None:
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, ["compare", "small", "--store", store.url])
    table = done.stdout.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= columns


@pytest.mark.slow
def test_nothing_heavy_is_loaded() -> None:
    code = "import sys, sdft_ray.analysis.compare, sdft_ray.report.comparison.terminal; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sdft_ray.statistics.paired" in loaded
    assert not {"torch", "ray", "vllm", "lm_eval", "jinja2", "pyarrow", "scipy"} & loaded
