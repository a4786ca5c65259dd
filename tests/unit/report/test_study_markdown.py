"""A study's table for a README: its cells are the study's figures."""

from __future__ import annotations

import dataclasses

import pytest

from sdft_ray.report.study.gather import gather_study
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, StudyData
from sdft_ray.report.study.tables import study_markdown
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report import made_up_study as made_up


@pytest.fixture(scope="module")
def study() -> StudyData:
    return gather_study(made_up.table(made_up.rows(num_seeds=2, num_items=40, blocks=(3,))), name="made_up")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.slow
def test_cells_are_the_figures_of_the_largest_size(study: StudyData) -> None:
    head, rule, teacher, *lines = map(cells_of, study_markdown(study).splitlines())
    names = [f"`{task}`" for task in made_up.TASKS]
    assert head == ["", "recovery", "against sft", "off-domain recovery", "average", *names]
    assert rule == ["---", *["---:"] * (len(head) - 1)]
    assert teacher[0] == "teacher"
    starts = [place for place, line in enumerate(lines) if line[0].startswith("**")]
    assert len(starts) == len(study.panels) == 2
    for panel, start in zip(study.panels, starts, strict=True):
        assert lines[start] == [f"**{panel.name.replace('_', chr(92) + '_')}, 4,000 rows**"]
        assert [line[0] for line in lines[start + 1 : start + 3]] == [r"pruned (sft, sdft, sdft\_kd)", "pruned (tail)"]
        for line, arm in zip(lines[start + 3 : start + 7], panel.arms, strict=True):
            cell = panel.cell(arm, 4000)
            assert cell is not None
            assert line[0] == arm.replace("_", r"\_")
            margins = {task: f" ± {100 * margin:.1f}" for task, margin in cell.margins.items()}
            assert line[5:12] == [f"{100 * cell.scores[task]:.1f}{margins.get(task, '')}" for task in made_up.TASKS]
            found, ahead = cell.recovery[ALL], cell.ahead.get(ALL)
            assert found.low is not None
            assert line[1].replace("**", "").startswith(f"{100 * found.known:.1f} ({100 * found.low:.1f} to ")
            assert line[2].replace("−", "-").startswith(f"{100 * ahead.known:+.1f} (" if ahead else "")
            assert bool(line[2]) == (arm != "sft")
            assert line[3].startswith(f"{100 * cell.recovery[OFF_DOMAIN].known:.1f} (")
        best = max(panel.arms, key=lambda arm: panel.cell(arm, 4000).recovery[ALL].known)  # pyright: ignore[reportOptionalMemberAccess]
        strong = [line[0] for line in lines[start + 1 : start + 7] if line[1].startswith("**")]
        assert strong == [best.replace("_", r"\_")]


def test_students_that_read_alike_are_best_alike(study: StudyData) -> None:
    panel = study.panels[0]
    same = Estimate(0.98503, low=0.97, high=1.0)
    cells = [dataclasses.replace(cell, recovery={**cell.recovery, ALL: same}) for cell in panel.cells]
    cells[-1].recovery[ALL] = dataclasses.replace(same, value=0.98504)
    lines = study_markdown(dataclasses.replace(study, panels=(dataclasses.replace(panel, cells=tuple(cells)),)))
    assert lines.count("**98.5**") == len(panel.arms)


def test_tasks_of_one_panel_alone_leave_gaps_in_the_others(study: StudyData) -> None:
    one, other = study.panels
    fewer = dataclasses.replace(one, tasks=one.tasks[1:])
    lines = study_markdown(dataclasses.replace(study, panels=(fewer, other))).splitlines()
    assert len({line.count("|") for line in lines[:2]}) == 1
    assert max(line.count("|") for line in lines) == lines[0].count("|")


def test_a_study_without_panels_has_none() -> None:
    with pytest.raises(ValueError, match="no table"):
        study_markdown(StudyData("empty", ()))
