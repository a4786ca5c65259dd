"""What students kept: every figure is the card's, and what is missing, hostile or no number is shown as such."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sdft_ray.evaluation.card import retention_card
from sdft_ray.evaluation.release import Bounds, Judgement, judge
from sdft_ray.recipe.scoring import Release
from sdft_ray.report.run.cards import GENERATED, SCORED, Student, students
from sdft_ray.report.run.model import ReportData, Retention
from sdft_ray.report.run.page import render
from sdft_ray.report.run.retention import retention
from sdft_ray.report.run.terminal import flip_lines, release_lines
from sdft_ray.report.run.words import beyond_chance, percents, released, reversals
from sdft_ray.report.toolbox.table import DASH, Cell, Row
from sdft_ray.statistics.estimate import Estimate
from sdft_ray.statistics.paired import paired_bootstrap
from sdft_ray.statistics.scores import Scores
from tests.unit.report.made_up import (
    FAMILIES,
    RELEASE,
    SCORES,
    TUNED,
    evaluated,
    kept,
    recovery_from,
    recovery_of,
    task_score,
)
from tests.unit.report.test_page import Reader

Change = dict[str, Any]


def changed(changes: dict[str, dict[str, Change]], models: Sequence[str] = tuple(SCORES)) -> dict[str, Scores]:
    """The made-up evaluation with other fields for some tasks of some models."""
    found = {model: own for model, own in evaluated().items() if model in models}
    for model, by_task in changes.items():
        tasks = {task: replace(found[model].tasks[task], **fields) for task, fields in by_task.items()}
        found[model] = replace(found[model], tasks={**found[model].tasks, **tasks})
    return found


def everywhere(task: str, **fields: Any) -> dict[str, dict[str, Change]]:
    return {model: {task: fields} for model in SCORES}


def shown(scores: dict[str, Scores], release: Release | None = None) -> ReportData:
    """What a report of these scores has."""
    return ReportData(
        name="x",
        retention=retention(scores, TUNED, release),
        recovery={name: recovery_of(name) for name in ("sft", "sdft")},
    )


def student(data: ReportData, name: str) -> Student:
    return next(one for one in students(data) if one.name == name)


def row(one: Student, task: str) -> Row:
    return next(row for group in one.tasks.groups for row in group.rows if row.head.text == task)


def texts(row: Row) -> tuple[str, ...]:
    return tuple(cell.text for cell in row.cells)


def lowered(value: float) -> dict[str, Scores]:
    """`sft` answers so many facts rightly."""
    score = task_score("sft", "facts", value)
    return changed({"sft": {"facts": {"value": value, "items": score.items, "stderr": score.stderr}}})


# --- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "sdft"])
def test_every_figure_is_the_cards(name: str) -> None:
    scores, found = evaluated(), kept().students[name]
    card = retention_card(scores["teacher"], scores["pruned"], scores[name], tuned=TUNED)
    assert found == card
    assert found.recovery_interval is not None
    assert found.chance_corrected_interval is not None
    assert all(task.from_teacher.interval and task.from_teacher.test for task in found.tasks)
    assert all(task.from_pruned.interval and task.from_pruned.test for task in found.tasks)
    assert {len(task.written) for task in found.tasks if task.is_generative} == {3}
    assert kept().judgements[name] == judge(card, Bounds(0.85, 0.8, True))


def test_the_lead_is_paired_over_all_tasks() -> None:
    scores, lead = evaluated(), kept().lead
    assert lead is not None
    assert (lead.best, lead.next_best) == ("sdft", "sft")
    found = paired_bootstrap(scores["sft"], scores["sdft"])
    assert (lead.difference.value, lead.difference.low, lead.difference.high) == (found.value, found.low, found.high)
    means = [sum(SCORES[name]) / len(FAMILIES) for name in ("sdft", "sft")]
    assert lead.difference.value == pytest.approx(means[0] - means[1])


def test_no_lead_without_a_rival_or_without_items() -> None:
    assert retention(changed({}, ("teacher", "pruned", "sft")), TUNED, None).lead is None
    assert retention(changed({"sft": {"facts": {"items": {}}}}), TUNED, None).lead is None


def test_nothing_is_kept_without_teacher_or_pruned_model() -> None:
    assert retention(changed({}, ("teacher", "sft")), TUNED, RELEASE) == Retention()
    assert retention(changed({}, ("pruned", "sft")), TUNED, RELEASE) == Retention()


def test_a_patched_model_is_a_student_too() -> None:
    scores = {**evaluated(), "patched": lowered(0.5)["sft"]}
    found = retention(scores, TUNED, RELEASE)
    assert list(found.students) == list(found.judgements) == ["sft", "sdft", "patched"]
    (said, beyond), *_ = reversals("patched", found.students["patched"])
    assert beyond
    assert said.startswith("Patching made it worse than pruning alone on facts: −38.0 points (")


def test_another_harness_is_told_and_is_not_releasable() -> None:
    scores = {model: replace(own, harness="0.4.13") for model, own in evaluated().items()}
    scores["sft"] = replace(scores["sft"], harness="0.4.12")
    found = retention(scores, TUNED, RELEASE)
    assert list(found.students) == ["sdft"]
    assert "0.4.12" in found.incomparable["sft"]
    assert not found.judgements["sft"].releasable
    assert "0.4.12" in found.judgements["sft"].reasons[0]
    assert "What sft kept cannot be told: results of different harness" in render(ReportData(name="x", retention=found))


def test_bounds_are_told_in_words() -> None:
    assert kept().bounds == (
        "mean recovery at least 85 %",
        "recovery on every task at least 80 %",
        "no task worse, beyond chance, than after pruning alone",
    )
    assert retention(evaluated(), TUNED, Release(min_task_recovery=0.875)).bounds == (
        "recovery on every task at least 87.5 %",
    )


# --- tables -------------------------------------------------------------------------------------------------


def test_generated_answers_come_first_and_the_best_student_does() -> None:
    data = shown(evaluated(), RELEASE).model_copy(update={"tuned_families": TUNED})
    assert [one.name for one in students(data)] == ["sdft", "sft"]
    one = student(data, "sdft")
    assert [group.name for group in one.tasks.groups] == [GENERATED, SCORED]
    assert [row.head.text for row in one.tasks.groups[0].rows] == ["word_problems", "lists"]
    assert [row.head.tag for row in one.tasks.groups[1].rows] == ["tuned", "", "", "", ""]


def test_a_row_by_hand() -> None:
    cells = row(student(shown(evaluated()), "sft"), "facts").cells
    assert [cell.text for cell in cells[:6]] == ["96.5", "88.0", "84.5", "87.6", "83.2", "−12.0"]
    assert cells[7].text == "−3.5"
    assert cells[5].note == "−17.7 to −6.9"
    assert cells[0].note.replace("\u202f", " ") == "± 1.3"
    assert cells[6] == Cell("<0.001", "14.0 / 2.0")


def test_facts_have_the_mean_beside_the_worst_task() -> None:
    facts = {
        label: (figure.replace("\u202f", " "), note)
        for label, figure, note in student(shown(evaluated()), "sdft").facts
    }
    assert facts["Mean recovery"] == ("92.3 %", "90.4 to 94.1")
    assert facts["Worst task"] == ("88.1 %", "lists")
    assert facts["Chance-corrected"][0] == "90.6 %"
    assert facts["After pruning"][0] == "67.2 %"
    scores = evaluated()
    pairs = [(scores["teacher"].tasks[task], scores["sdft"].tasks[task]) for task in FAMILIES]
    lost = sum(value > other.items[item] for one, other in pairs for item, value in one.items.items())
    assert facts["Right to wrong"][0] == f"{100 * lost / 1400:.1f} %"
    assert facts["Right to wrong"][1].endswith(" of 1,400 items")


def test_tasks_without_chance_have_no_second_mean() -> None:
    scores = changed({model: {task: {"chance": 0.0} for task in FAMILIES} for model in SCORES})
    labels = [label for label, *_ in student(shown(scores), "sft").facts]
    assert labels == ["Mean recovery", "Worst task", "After pruning", "Right to wrong", "Wrong to right"]


def test_what_is_left_out_is_told() -> None:
    worse_when_high = {"higher_is_better": False, "value": 3.25, "metric": "word_perplexity"}
    scores = changed({model: {"facts": worse_when_high, "myths": {"chance": None}} for model in SCORES})
    one = student(shown(scores), "sft")
    assert one.left_out == (
        "Not in the mean: facts (lower is better for word_perplexity). "
        "Not chance-corrected, as what guessing scores is not known: myths."
    )
    cells = row(one, "facts").cells
    assert [cell.text for cell in cells] == ["3.25", "3.25", "3.25", DASH, DASH, "0", DASH, "0"]


def test_capabilities_stand_below_where_one_has_several_tasks() -> None:
    scores = {
        model: Scores({f"lab_{task}": replace(score, task=f"lab_{task}") for task, score in own.tasks.items()})
        for model, own in evaluated().items()
    }
    group = student(shown(scores), "sdft").tasks.groups[-1]
    assert group.name == "By capability"
    commonsense = next(row for row in group.rows if row.head.text == "commonsense")
    assert commonsense.head.note == "2 tasks"
    assert [cell.text for cell in commonsense.cells] == ["97.0", "92.2", "93.8", "96.6"]


def test_how_answers_look() -> None:
    """Of 200 word problems sft has 48 % right and gives no answer to 26 %: another 26 % are wrong."""
    answers = student(shown(evaluated()), "sft").answers
    assert answers is not None
    assert [column.text for column in answers.columns[1:]] == [
        "pass@1", "pass@1, sampled", "pass@8", "wrong", "no answer", "cut off", "repeated", "tokens",
    ]  # fmt: skip
    group = answers.groups[0]
    assert (group.name, [row.head.text for row in group.rows]) == ("word_problems", ["teacher", "pruned", "sft"])
    assert texts(group.rows[2]) == ("48.0", "48.0", "74.0", "26.0", "26.0", "13.0", "8.7", "38.9")


def test_wrong_answers_are_counted_only_where_items_are_right_or_wrong() -> None:
    half = {str(i): 0.5 for i in range(200)}
    scores = changed(everywhere("lists", items=half, value=0.5))
    answers = student(shown(scores), "sft").answers
    assert answers is not None
    assert [row.cells[3].text for row in answers.groups[1].rows] == [DASH] * 3


def test_scores_of_before_answers_were_looked_at() -> None:
    scores = changed({model: {task: {"written": None} for task in FAMILIES} for model in SCORES})
    one = student(shown(scores), "sft")
    assert one.answers is None
    assert one.tasks.groups[0].name == GENERATED, "nothing can be guessed"
    assert "How answers look" not in render(shown(scores))


def test_answers_of_one_model_alone() -> None:
    scores = changed({model: {task: {"written": None} for task in FAMILIES} for model in ("teacher", "pruned")})
    answers = student(shown(scores), "sft").answers
    assert answers is not None
    teacher, _, own = answers.groups[0].rows
    assert texts(teacher) == ("97.5", *[DASH] * 7)
    assert DASH not in texts(own)


# --- what is missing, or no number --------------------------------------------------------------------------


def test_a_dash_where_items_are_missing() -> None:
    data = shown(changed({"sft": {"facts": {"items": {}}}}), RELEASE)
    one = student(data, "sft")
    cells = row(one, "facts").cells
    assert cells[5:] == (Cell("−12.0", DASH), Cell(DASH), Cell("−3.5", DASH))
    assert one.facts[0][2] == "no interval"
    assert any("cannot be told whether" in said for said, _ in one.reversals)
    assert any("cannot be told whether" in reason for reason in data.retention.judgements["sft"].reasons)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_dash(value: float) -> None:
    data = shown(changed({"sft": {"facts": {"value": value, "stderr": math.nan, "items": {}}}}), RELEASE)
    assert row(student(data, "sft"), "facts").cells[2] == Cell(DASH)
    assert not re.search(r"\b(nan|inf)\b", Reader(render(data)).text, re.I)
    assert not re.search(r"\b(NaN|Infinity|None)\b", data.to_json())


def test_a_teacher_that_scores_nothing() -> None:
    nothing = {str(i): 0.0 for i in range(200)}
    data = shown(changed({"teacher": {"facts": {"value": 0.0, "items": nothing, "stderr": 0.0}}}), RELEASE)
    assert row(student(data, "sft"), "facts").cells[3] == Cell(DASH)
    assert any("undefined" in reason for reason in data.retention.judgements["sft"].reasons)
    render(data)


# --- words and marks ----------------------------------------------------------------------------------------


def test_reversals_are_named_and_those_within_chance_apart() -> None:
    said = reversals("sft", retention(lowered(0.7), TUNED, None).students["sft"])
    assert [beyond for _, beyond in said] == [True, False]
    assert re.fullmatch(
        r"Fine-tuning made it worse than pruning alone on facts: −18\.0 points \(−2\d\.\d to −1\d\.\d\)\.", said[0][0]
    )
    assert said[1][0].startswith("Worse as well, but within chance: myths: −3.0 points (")


def test_no_reversal_is_no_sentence() -> None:
    assert reversals("sdft", kept().students["sdft"]) == []
    assert beyond_chance(kept()) == ""


@pytest.mark.slow
def test_students_are_marked_where_the_recipe_has_bounds() -> None:
    page = render(shown(evaluated(), RELEASE))
    assert page.count(">releasable</span>") == page.count(">not releasable</span>") == 1
    assert "Recovery on word_problems is 49.2" in page
    without = render(shown(evaluated()))
    assert "releasable" not in without.lower()


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("ab", "", "Releasable: a and b."),
        ("a", "bcd", "Releasable: a. Not releasable: b, c and d."),
        ("", "a", "Not releasable: a misses the release bounds of the recipe."),
        ("", "ab", "Not releasable: a and b miss the release bounds of the recipe."),
        ("", "", ""),
    ],
)
def test_the_verdict_on_releases(good: str, bad: str, said: str) -> None:
    judged = [(name, True) for name in good] + [(name, False) for name in bad]
    found = Retention(judgements={name: Judgement(releasable, ()) for name, releasable in judged})
    assert released(found) == said


def test_hostile_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    text = shown(lowered(0.5), RELEASE).to_json()
    for word in ("facts", "word_problems", "exact_match", "sft", "procedures"):
        text = text.replace(word, evil.replace('"', '\\"'))
    page = render(ReportData.from_json(text))
    assert "<script" not in page
    assert Reader(page).text.count("alert('x')") > 20


def test_the_terminal_says_who_may_be_released() -> None:
    lines = [line.plain for line in release_lines(shown(lowered(0.5), RELEASE))]
    assert lines[0].startswith("sft: not releasable. Mean recovery is 6")
    assert lines[0].endswith("4 more in the report.")
    assert lines[1] == "sdft: releasable"
    assert re.fullmatch(
        r"Worse than after pruning alone, beyond chance: sft on facts: −38\.0 points \(−\d+\.\d to −\d+\.\d\)\.",
        lines[2],
    )
    assert len(lines) == 3
    assert release_lines(ReportData(name="x")) == []


def test_the_terminal_takes_names_for_names() -> None:
    judged = Judgement(False, ("[red]bad[/] [/nonsense]",))
    (line,) = release_lines(ReportData(name="x", retention=Retention(judgements={"[bold]": judged})))
    assert line.plain == "[bold]: not releasable. [red]bad[/] [/nonsense]"


def test_students_without_a_recovery_come_last() -> None:
    nothing = recovery_from(Estimate(None))
    none = replace(
        kept().students["sft"], tasks=(), capabilities=(), reversals=(), recovery=nothing, recovery_interval=None,
        chance_corrected=nothing, chance_corrected_interval=None, pruned_recovery=Estimate(None),
    )  # fmt: skip
    parts = {"lost": none, "sft": kept().students["sft"]}
    recovery = {"lost": nothing, "sft": recovery_of("sft")}
    data = ReportData(name="x", retention=Retention(students=parts), recovery=recovery)
    assert [one.name for one in students(data)] == ["sft", "lost"]
    assert student(data, "lost").mean == DASH
    render(data)


def test_all_headings_and_tables_are_in_order() -> None:
    reader = Reader(render(shown(lowered(0.5), RELEASE)))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert sum(tag == "table" for tag, _ in reader.tags) == sum(tag == "caption" for tag, _ in reader.tags)


def test_flips_are_told_in_the_terminal() -> None:
    sft, _ = (str(line) for line in flip_lines(shown(evaluated())))
    found = kept().students["sft"].flips
    assert found is not None
    lost, gained = found.right_to_wrong, found.wrong_to_right
    assert sft == (
        f"sft: of 1,400 items {100 * (lost.value or 0):.1f} % ({percents(lost)}) went from right to wrong and "
        f"{100 * (gained.value or 0):.1f} % ({percents(gained)}) back, against the teacher"
    )
    assert flip_lines(ReportData(name="x")) == []
