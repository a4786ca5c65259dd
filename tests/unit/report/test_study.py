"""From a study's table to figures and sentences: each figure against a plain computation over the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sdft_ray.errors import DataError
from sdft_ray.report.study.fit import covariance, recovery_moves
from sdft_ray.report.study.gather import gather_study
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, TUNED, Panel, StudyData
from sdft_ray.report.study.words import bounds, cells_compared, fit_words, verdict
from sdft_ray.report.toolbox.numbers import THIN, points
from sdft_ray.statistics.crossed import crossed_mean, crossed_recovery
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report import made_up_study as made_up

ROWS = made_up.rows(num_seeds=3, num_items=60, blocks=(3,))
TASKS = {ALL: made_up.TASKS, TUNED: made_up.TUNED, OFF_DOMAIN: made_up.TASKS[3:]}


@pytest.fixture(scope="module")
def study() -> StudyData:
    return gather_study(made_up.table(ROWS), name="made_up")


def picked(arm: str, num_rows: int, tasks: Sequence[str], variant: str = "mixed") -> list[dict[str, Any]]:
    wanted = [row for row in ROWS if (row["variant"], row["arm"], row["num_rows"]) == (variant, arm, num_rows)]
    return [row for row in wanted if row["task"] in tasks]


def naive_recovery(arm: str, num_rows: int, tasks: Sequence[str]) -> float:
    """All tasks count alike, and have the same number of items and seeds here."""
    mine = picked(arm, num_rows, tasks)
    return float(np.mean([row["items"] for row in mine]) / np.mean([row["teacher_items"] for row in mine]))


def as_arrays(rows: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    tasks = dict.fromkeys(row["task"] for row in rows)
    by_seed = sorted(rows, key=lambda row: row["seed"])
    items = {task: np.array([row["items"] for row in by_seed if row["task"] == task]) for task in tasks}
    return items, {row["task"]: np.array(row["teacher_items"]) for row in rows}


def test_recovery_is_a_ratio_of_mean_scores(study: StudyData) -> None:
    panel = study.panels[0]
    assert len(panel.cells) == 4 * 5
    for cell in panel.cells:
        for group, tasks in TASKS.items():
            found = cell.recovery[group]
            assert found.known == pytest.approx(naive_recovery(cell.arm, cell.num_rows, tasks))
            peer = crossed_recovery(*as_arrays(picked(cell.arm, cell.num_rows, tasks)))
            assert (found.low, found.high) == pytest.approx((peer.low, peer.high))


def test_scores_are_means_over_seeds(study: StudyData) -> None:
    cell = study.panels[0].cell("sdft", 700)
    assert cell is not None
    assert list(cell.scores) == list(made_up.TASKS)
    for task, score in cell.scores.items():
        assert score == pytest.approx(np.mean([row["score"] for row in picked("sdft", 700, [task])]))
    assert cell.average == pytest.approx(np.mean([row["score"] for row in picked("sdft", 700, made_up.TASKS)]))
    assert (cell.num_seeds, cell.learning_rates) == (3, (7e-4,))
    assert list(cell.margins) == list(made_up.TASKS)
    for task, margin in cell.margins.items():
        items, _ = as_arrays(picked("sdft", 700, [task]))
        peer = crossed_mean(items)
        assert (cell.scores[task] - margin, cell.scores[task] + margin) == pytest.approx((peer.low, peer.high))


def test_scores_that_never_vary_have_no_margin() -> None:
    rows = [dict(row) for row in ROWS]
    for row in rows:
        if row["task"] == made_up.TASKS[0] and row["arm"] == "sdft":
            row |= {"items": [1.0] * len(row["items"]), "score": 1.0}
    cell = gather_study(made_up.table(rows), name="made_up").panels[0].cell("sdft", 700)
    assert cell is not None
    assert list(cell.margins) == list(made_up.TASKS[1:])


def test_differences_are_paired_with_the_first_arm(study: StudyData) -> None:
    """The error is that of a difference of two linearised ratios, item by item and seed by seed."""
    for cell in study.panels[0].cells:
        if cell.arm == "sft":
            assert cell.ahead == {}
            continue
        for group, tasks in TASKS.items():
            own, first = (naive_recovery(arm, cell.num_rows, tasks) for arm in (cell.arm, "sft"))
            assert cell.ahead[group].known == pytest.approx(own - first)
            (mine, teacher), (theirs, _) = (as_arrays(picked(a, cell.num_rows, tasks)) for a in (cell.arm, "sft"))
            whole = np.mean([teacher[task] for task in tasks])
            moves = {t: (mine[t] - theirs[t] - (own - first) * teacher[t]) / whole for t in tasks}
            peer = crossed_mean(moves)
            assert peer.low is not None
            assert cell.ahead[group].low == pytest.approx(own - first + peer.low)


def test_models_without_training(study: StudyData) -> None:
    panel = study.panels[0]
    assert panel.teacher["lists"] == pytest.approx(np.mean(picked("sft", 125, ["lists"])[0]["teacher_items"]))
    assert [pruned.arms for pruned in panel.pruned] == [("sft", "sdft", "sdft_kd"), ("tail",)]
    for pruned, scores in zip(panel.pruned, (made_up.PRUNED, made_up.TAIL_PRUNED), strict=True):
        assert tuple(pruned.scores.values()) == scores
        assert pruned.recovery[TUNED] == pytest.approx(sum(scores[:3]) / sum(list(panel.teacher.values())[:3]))
    assert panel.pruned_of("tail") is panel.pruned[1]


def test_panels_go_by_variant_and_blocks_whatever_an_arm_prunes_by(study: StudyData) -> None:
    """The tail arm has a metric of its own and still stands beside the others."""
    assert [panel.name for panel in study.panels] == [
        "mixed, 3 of 12 blocks removed",
        "word_problems, 3 of 12 blocks removed",
    ]
    assert [panel.arms for panel in study.panels] == [made_up.ARMS, made_up.ARMS]
    assert study.panels[1].tuned == ("word_problems",)
    assert study.num_students == 2 * 4 * 5 * 3


def test_an_arm_with_a_fixed_metric_stands_under_every_metric_that_varies() -> None:
    some = made_up.rows(sizes=(125, 300), blocks=(3,), num_seeds=2, num_items=20, variants=("",))
    influence = [{**row, "metric": "block_influence"} for row in some if row["arm"] != "tail"]
    found = gather_study(made_up.table(some + influence), name="x")
    assert [panel.metric for panel in found.panels] == ["angular_distance", "block_influence"]
    assert [panel.arms for panel in found.panels] == [made_up.ARMS, made_up.ARMS]
    assert found.panels[0].name == "angular_distance, 3 of 12 blocks removed"
    assert found.num_students == 7 * 2 * 2


def test_the_order_of_rows_does_not_matter(study: StudyData) -> None:
    head, rest = ROWS[:1], ROWS[1:]
    shuffled = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))]
    found = gather_study(made_up.table(head + shuffled), name="made_up")
    assert len(found.panels) == len(study.panels)
    for panel in study.panels:
        other = next(part for part in found.panels if part.variant == panel.variant)
        for cell in panel.cells:
            twin = other.cell(cell.arm, cell.num_rows)
            assert twin is not None
            for group in panel.groups:
                own, theirs = cell.recovery[group], twin.recovery[group]
                assert (theirs.value, theirs.low, theirs.high) == pytest.approx((own.known, own.low, own.high))


def test_known_curves_come_back() -> None:
    """Tuned tasks follow a power law with the ceiling 0.92, sft falls off-domain, sdft stays where it is."""
    some = made_up.rows(blocks=(3,), arms=("sft", "sdft"), variants=("mixed",), num_items=400, seed=2)
    fits = gather_study(made_up.table(some), name="x").panels[0].fits
    tuned = fits["sdft", TUNED]
    assert tuned.kind == "curve"
    assert tuned.asymptote is not None
    assert tuned.asymptote.low is not None
    assert tuned.asymptote.high is not None
    assert tuned.asymptote.low <= 0.92 <= tuned.asymptote.high < 1.1
    assert [more.num_rows for more in tuned.more] == [8000, 16_000, 40_000]
    assert (tuned.line[0].num_rows, tuned.line[-1].num_rows) == (125, 8000)
    assert 4000 in [point.num_rows for point in tuned.line]
    assert fits["sft", OFF_DOMAIN].kind == "falling"
    assert fits["sdft", OFF_DOMAIN].kind == "flat"
    assert "from the smallest size to the largest −" in fit_words(fits["sft", OFF_DOMAIN])


def test_errors_of_sizes_covary_through_their_items() -> None:
    """Means of 400 studies vary together as the estimate of each, on average, says."""
    rng = np.random.default_rng(5)
    num_seeds, num_items = 3, 80
    means, estimates = [], []
    for _ in range(400):
        item_I = 0.4 * rng.standard_normal(num_items)
        tables = [
            {"t": 0.8 + item_I + 0.02 * rng.standard_normal((num_seeds, 1)) + 0.2 * rng.standard_normal((3, num_items))}
            for _ in range(3)
        ]
        means.append([table["t"].mean() for table in tables])
        estimates.append(covariance([crossed_mean(table) for table in tables], tables))
    seen, told = np.cov(np.array(means).T), np.mean(estimates, axis=0)
    assert told[0, 1] == pytest.approx(0.4**2 / num_items, rel=0.1)
    np.testing.assert_allclose(told, seen, rtol=0.2)


def test_moves_have_the_mean_and_the_error_of_the_recovery() -> None:
    items, teacher = as_arrays(picked("sdft", 700, made_up.TASKS))
    moves = crossed_mean(recovery_moves(items, teacher))
    peer = crossed_recovery(items, teacher)
    assert (moves.value, moves.stderr, moves.low) == pytest.approx((peer.value, peer.stderr, peer.low))


def test_untrained_rows_are_told_and_not_fitted() -> None:
    some = made_up.rows(sizes=(125, 300), blocks=(3,), arms=("sft", "sdft"), num_seeds=1, num_items=30, variants=("",))
    some = [{**row, "num_rows": 0 if row["num_rows"] == 125 else row["num_rows"]} for row in some]
    panel = gather_study(made_up.table(some), name="x").panels[0]
    assert panel.sizes == (0, 300)
    assert panel.fits["sft", ALL].note == "a curve needs 4 sizes, and there are 1"
    assert cells_compared(panel)[0].num_rows == 300


WRONG: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = {
    "no column": (lambda rows: [{k: v for k, v in row.items() if k != "seed"} for row in rows], "no column 'seed'"),
    "a null": (lambda rows: [{**rows[0], "score": None}, *rows[1:]], "nulls in 'score'"),
    "not finite": (lambda rows: [{**rows[0], "score": float("nan")}, *rows[1:]], "no whole values on 'word_problems'"),
    "an item short": (lambda rows: [{**rows[0], "items": rows[0]["items"][1:]}, *rows[1:]], "no whole values"),
    "a task short": (lambda rows: rows[1:], "does not have every task once"),
    "twice": (lambda rows: [*rows, rows[0]], "does not have every task once"),
    "a seed short": (lambda rows: [r for r in rows if (r["arm"], r["seed"]) != ("sft", 1)], "with the same seeds"),
    "two teachers": (
        lambda rows: [{**rows[0], "teacher_items": [1 - v for v in rows[0]["teacher_items"]]}, *rows[1:]],
        "not the same for all students",
    ),
    "a teacher of nothing": (
        lambda rows: [{**row, "teacher_items": [0.0] * len(row["items"])} for row in rows],
        "recovery is undefined",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tables_that_are_no_whole_study_are_refused(wrong: str) -> None:
    some = made_up.rows(sizes=(125, 300), blocks=(3,), arms=("sft", "sdft"), num_seeds=2, num_items=10, variants=("",))
    spoil, words = WRONG[wrong]
    with pytest.raises(DataError, match=words):
        gather_study(made_up.table(spoil(some)), name="x")


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        gather_study(made_up.table(ROWS)[:0], name="x")


def said(panel: Panel, ahead: Mapping[str, Estimate | None], **recovery: Estimate) -> str:
    """The verdict on a panel whose last size has these figures for sdft."""
    cells = []
    for cell in panel.cells:
        if cell.num_rows == 4000 and cell.arm == "sdft":
            cell = dataclasses.replace(cell, ahead=ahead, recovery={**cell.recovery, **recovery})
        cells.append(cell)
    arms = ("sft", "sdft")
    kept = tuple(cell for cell in cells if cell.arm in arms)
    return made_up.plain_text(verdict(dataclasses.replace(panel, arms=arms, cells=kept))).replace(THIN, " ")


def test_verdicts_say_wins_losses_and_nulls_in_words(study: StudyData) -> None:
    panel, whole = study.panels[0], {ALL: Estimate(0.912, low=0.904, high=0.92)}
    won = said(panel, {ALL: Estimate(0.031, low=0.022, high=0.04)}, **whole)
    assert won.startswith("At 4,000 rows sft recovers ")
    assert "sdft 91.2 % (90.4 to 92.0), 3.1 points more than sft (2.2 to 4.0)." in won
    lost = said(panel, {ALL: Estimate(-0.031, low=-0.04, high=-0.022)}, **whole)
    assert "sdft 91.2 % (90.4 to 92.0), 3.1 points less than sft (2.2 to 4.0)." in lost
    null = said(panel, {ALL: Estimate(0.004, low=-0.006, high=0.014)}, **whole)
    assert "which cannot be told apart from sft: +0.4 points (−0.6 to +1.4)." in null
    alone = said(panel, {ALL: Estimate(0.004)}, **whole)
    assert "+0.4 points from sft, which has no interval." in alone


def test_harm_is_said(study: StudyData) -> None:
    panel = study.panels[0]
    text = made_up.plain_text(verdict(panel)).replace(THIN, " ")
    assert "Off-domain sft is worse than no training: " in text
    assert f"the pruned model alone {100 * panel.pruned[0].recovery[OFF_DOMAIN]:.1f} %." in text
    assert "tuned tasks sft is worse" not in text
    near = {OFF_DOMAIN: Estimate(0.9, low=0.88, high=0.92)}
    level = panel.pruned[0].recovery[OFF_DOMAIN]
    assert 0.9 < level < 0.92
    cells = tuple(dataclasses.replace(cell, recovery={**cell.recovery, **near}) for cell in panel.cells)
    assert "worse than no training" not in made_up.plain_text(
        verdict(dataclasses.replace(panel, cells=cells, pruned=panel.pruned[:1], arms=("sft", "sdft")))
    )


def test_arms_that_lack_the_size_are_named(study: StudyData) -> None:
    panel = study.panels[0]
    cells = tuple(cell for cell in panel.cells if (cell.arm, cell.num_rows) != ("tail", 4000))
    assert "Not trained on 4,000 rows: tail." in made_up.plain_text(verdict(dataclasses.replace(panel, cells=cells)))


def test_figures_in_words() -> None:
    assert [points(value) for value in (0.031, -0.031, 0.0, 0.0002, -0.0002)] == ["+3.1", "−3.1", "0.0", "0.0", "0.0"]
    assert bounds(Estimate(0.5, low=0.4, high=0.6)) == " (40.0 to 60.0)"
    assert bounds(Estimate(0.5, low=-0.4, high=0.6), sign=True) == " (−40.0 to +60.0)"
    assert bounds(Estimate(0.5)) == ""
    assert [Estimate(1, None, *ends).is_clear for ends in ((0.1, 2), (-1, -0.1), (-1, 2), (None, None))] == [
        True, True, False, False,
    ]  # fmt: skip
