"""The retention card: every figure from `recovery` and `paired` or by hand, the order of tasks, and plain JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.capabilities import CAPABILITIES, capability_of
from sdft_ray.evaluation.card import Card, TaskCard, retention_card
from sdft_ray.evaluation.recovery import Estimate, recovery
from sdft_ray.statistics.paired import mcnemar, paired_bootstrap, recovery_interval
from sdft_ray.statistics.scores import GenerationStats, Scores, TaskScore

N = 200
WRITTEN = GenerationStats(N, 31.5, 0.25, 0.1, 0.4, {"1": 0.2, "8": 0.5})


def score(task: str, share: float, *, seed: int = 0, chance: float | None = 0.25, **changes: Any) -> TaskScore:
    """0/1 items of which this share is right; models of one seed answer the same items rightly first."""
    order = np.random.default_rng(seed).permutation(N)
    items = {str(i): float(order[i] < share * N) for i in range(N)}
    value = sum(items.values()) / N
    stderr = float(np.std(list(items.values()), ddof=1) / N**0.5)
    return replace(TaskScore(task, "acc", "none", value, stderr, N, 0, True, chance, items), **changes)


def model(shares: dict[str, float], seed: int = 0, **changes: Any) -> Scores:
    """The laboratory's word problems and lists are generated, the others chosen from four options."""
    generated = {"lab_word_problems", "lab_lists"}
    return Scores({
        task: score(task, share, seed=seed, chance=0.0 if task in generated else 0.25, **changes)
        for task, share in shares.items()
    })  # fmt: skip


TEACHER = model(
    {"lab_facts": 0.95, "lab_word_problems": 0.9, "lab_scripts": 0.8, "lab_pronouns": 0.9, "lab_lists": 0.8}
)
PRUNED = model(
    {"lab_facts": 0.9, "lab_word_problems": 0.05, "lab_scripts": 0.7, "lab_pronouns": 0.8, "lab_lists": 0.5}, 1
)
STUDENT = model(
    {"lab_facts": 0.92, "lab_word_problems": 0.7, "lab_scripts": 0.69, "lab_pronouns": 0.75, "lab_lists": 0.2}, 2
)


def task_of(card: Card, name: str) -> TaskCard:
    return next(task for task in card.tasks if task.task == name)


@pytest.fixture(scope="module")
def card() -> Card:
    student = Scores(STUDENT.tasks | {"lab_lists": replace(STUDENT.tasks["lab_lists"], written=WRITTEN)})
    return retention_card(TEACHER, PRUNED, student, tuned=["lab_word_problems"])


def test_ratios_are_those_of_recovery(card: Card) -> None:
    plain = recovery(TEACHER, STUDENT, tuned=["lab_word_problems"])
    corrected = recovery(TEACHER, STUDENT, tuned=["lab_word_problems"], chance_corrected=True)
    assert (card.recovery, card.chance_corrected) == (plain, corrected)
    assert card.recovery.mean.value == pytest.approx((0.92 + 0.7 + 0.69 + 0.75 + 0.2) / (0.95 + 0.9 + 0.8 + 0.9 + 0.8))
    assert card.recovery.min_task == "lab_lists"
    assert card.pruned_recovery == recovery(TEACHER, PRUNED).mean
    assert card.recovery_interval == recovery_interval(TEACHER, STUDENT)
    assert card.chance_corrected_interval == recovery_interval(TEACHER, STUDENT, chance_corrected=True)
    for task in card.tasks:
        assert (task.recovery, task.chance_corrected) == (plain.tasks[task.task], corrected.tasks[task.task])
        assert task.is_tuned == (task.task == "lab_word_problems")
    assert card.left_out == ()


def test_one_task_in_full(card: Card) -> None:
    facts = task_of(card, "lab_facts")
    assert (facts.capability, facts.is_generative, facts.metric, facts.num_items) == ("knowledge", False, "acc", N)
    assert facts.teacher == Estimate(0.95, TEACHER.tasks["lab_facts"].stderr)
    assert (facts.pruned.value, facts.student.value, facts.chance) == (0.9, 0.92, 0.25)
    assert facts.from_teacher.difference == pytest.approx(-0.03)
    assert facts.from_teacher.interval == paired_bootstrap(TEACHER, STUDENT, tasks=["lab_facts"])
    assert facts.from_teacher.test == mcnemar(TEACHER.tasks["lab_facts"], STUDENT.tasks["lab_facts"])
    assert facts.from_pruned.difference == pytest.approx(0.02)
    assert facts.from_pruned.interval == paired_bootstrap(PRUNED, STUDENT, tasks=["lab_facts"])
    assert facts.written == {}
    assert task_of(card, "lab_lists").written == {"student": WRITTEN}


def test_generated_answers_come_first(card: Card) -> None:
    names = [task.task for task in card.tasks]
    assert names == ["lab_word_problems", "lab_lists", "lab_facts", "lab_scripts", "lab_pronouns"]
    assert [task.is_generative for task in card.tasks] == [True, True, False, False, False]
    found = [(part.capability, part.is_generative, part.tasks) for part in card.capabilities]
    assert found == [
        ("maths", True, ("lab_word_problems",)),
        ("procedures", True, ("lab_lists",)),
        ("knowledge", False, ("lab_facts",)),
        ("commonsense", False, ("lab_scripts", "lab_pronouns")),
    ]
    commonsense = card.capabilities[-1]
    assert commonsense.teacher.value == pytest.approx(0.85)
    assert commonsense.pruned.value == pytest.approx(0.75)
    assert commonsense.student.value == pytest.approx(0.72)
    assert commonsense.recovery.value == pytest.approx(0.72 / 0.85)


def test_reversals_are_told_with_and_without_chance(card: Card) -> None:
    """Lists fell by 0.3, scripts by 0.01 and pronouns by 0.05, which 200 items cannot tell from nothing."""
    found = {reversal.task: reversal for reversal in card.reversals}
    assert {task: reversal.is_beyond_chance for task, reversal in found.items()} == {
        "lab_lists": True, "lab_scripts": False, "lab_pronouns": False,
    }  # fmt: skip
    lists = found["lab_lists"].comparison
    assert lists == task_of(card, "lab_lists").from_pruned
    assert lists.difference == pytest.approx(-0.3)
    assert lists.interval is not None
    assert lists.interval.high is not None
    assert lists.interval.high < 0


def test_the_card_is_plain_json(card: Card) -> None:
    assert json.loads(json.dumps(asdict(card), allow_nan=False))["recovery"]["min_task"] == "lab_lists"


def test_what_cannot_be_had_is_none() -> None:
    """No values per item; a teacher at nothing; unknown chance; a perplexity; a score that is no number."""
    odd: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"items": {}}] * 3,
        "zero": [{"value": 0.0, "items": {str(i): 0.0 for i in range(N)}, "stderr": 0.0}, {}, {}],
        "unknown": [{"chance": None}] * 3,
        "ppl": [{"higher_is_better": False, "metric": "ppl", "chance": None}] * 3,
        "nan": [{}, {}, {"value": float("nan"), "items": {}, "stderr": float("nan")}],
    }
    shares = {"corpus": (0.9, 0.6, 0.5), "zero": (0.0, 0.1, 0.1), "unknown": (0.8, 0.5, 0.6), "ppl": (0.2, 0.4, 0.6)}

    def build(i: int) -> Scores:
        half = (0.5,) * 3
        return Scores({name: score(name, shares.get(name, half)[i], seed=i, **parts[i]) for name, parts in odd.items()})

    card = retention_card(build(0), build(1), build(2))
    json.dumps(asdict(card), allow_nan=False)
    corpus, zero, unknown, ppl, nan = (task_of(card, name) for name in odd)
    assert (corpus.from_teacher.interval, corpus.from_teacher.test) == (None, None)
    assert corpus.recovery.value == pytest.approx(5 / 9)
    assert zero.recovery == zero.chance_corrected == Estimate(None, None)
    assert unknown.recovery.value == pytest.approx(0.75)
    assert unknown.chance_corrected == Estimate(None, None)
    assert ppl.recovery == Estimate(None, None)
    assert ppl.from_pruned.interval is not None
    assert ppl.from_pruned.test is None
    assert (nan.student, nan.recovery, nan.from_teacher.difference) == (
        Estimate(None, None),
        Estimate(None, None),
        None,
    )
    assert card.left_out == ("ppl", "nan")
    assert card.recovery.mean.value == pytest.approx((0.5 + 0.1 + 0.6) / (0.9 + 0.0 + 0.8))
    assert card.recovery_interval is None
    assert {reversal.task: reversal.is_beyond_chance for reversal in card.reversals} == {"corpus": None, "ppl": True}


def test_graded_items_have_an_interval_and_no_test() -> None:
    def graded(shift: float) -> Scores:
        items = {str(i): (i % 10) / 20 + shift for i in range(N)}
        return Scores({"truthfulqa_mc2": score("truthfulqa_mc2", 0.5, items=items, value=sum(items.values()) / N)})

    comparison = retention_card(graded(0.4), graded(0.1), graded(0.2)).tasks[0].from_teacher
    assert comparison.interval is not None
    assert comparison.test is None


def test_refusals() -> None:
    with pytest.raises(EvaluationError, match="only one of the two models was scored on 'lab_facts'"):
        retention_card(TEACHER, PRUNED, Scores({task: STUDENT.tasks[task] for task in list(STUDENT.tasks)[1:]}))
    for place in range(3):
        versions = ["0.4.13"] * 3
        versions[place] = "0.4.9"
        models = [
            replace(part, harness=version) for part, version in zip((TEACHER, PRUNED, STUDENT), versions, strict=True)
        ]
        with pytest.raises(EvaluationError, match="different harness versions cannot be compared"):
            retention_card(*models)
    fewer = STUDENT.tasks["lab_facts"]
    items = {item: value for item, value in fewer.items.items() if int(item) < 100}
    fewer = replace(fewer, items=items, value=sum(items.values()) / 100)
    with pytest.raises(EvaluationError, match="no common set of items on 'lab_facts'"):
        retention_card(TEACHER, PRUNED, Scores(STUDENT.tasks | {"lab_facts": fewer}))


def test_capabilities() -> None:
    assert capability_of("mmlu") == capability_of("mmlu_abstract_algebra") == "knowledge"
    assert capability_of("lab_lists") == capability_of("heldout_lists") == "procedures"
    assert capability_of("gsm8k") == capability_of("lab_word_problems") == "maths"
    assert capability_of("mmluish") == capability_of("lambada_openai") == "other"
    assert set(CAPABILITIES.values()) == {
        "reasoning", "commonsense", "knowledge", "truthfulness", "maths", "procedures",
    }  # fmt: skip


def test_every_family_of_the_laboratory_has_a_capability() -> None:
    from sdft_ray.lab.families import FAMILIES

    assert all(capability_of(prefix + family) != "other" for family in FAMILIES for prefix in ("lab_", "heldout_"))
