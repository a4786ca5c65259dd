"""The output of `sdft study`, and the files that it writes for a study into the store."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sdft_ray.pipeline.study import Planned, Shared, StudyRun, rows_file
from sdft_ray.report.study.model import StudyData
from sdft_ray.report.toolbox.numbers import seconds

if TYPE_CHECKING:
    from sdft_ray.recipe.study import Study
    from sdft_ray.store.store import Store

ROWS, PAGE, FIGURE, TABLE = "rows.parquet", "study.html", "study.png", "study.md"


def print_plan(study: Study, plan: Planned) -> None:
    """Prints such a line: Study data_size: 8 recipes, 560 trainings (240 for rates, 320 for seeds); 12 are done."""
    size, most = plan.size, study.budget.max_trainings
    parts = f"{size.num_rate_trainings:,} for rates, {size.num_seed_trainings:,} for seeds"
    budget = f" of a budget of {most:,}" if most is not None else ""
    done = f"; {plan.num_done:,} are done" if plan.num_done else ""
    recipes = f"{size.num_recipes:,} recipe{'s' * (size.num_recipes != 1)}"
    Console(highlight=False, stderr=True).print(
        f"Study {study.name}: {recipes}, {size.num_trainings:,} trainings ({parts}){budget}{done}.",
        soft_wrap=True,
    )


def print_study(run: StudyRun, store: Store, *, as_json: bool) -> None:
    """The result, and the paths of its files."""
    from sdft_ray.report.study.terminal import study_lines

    data = data_of(run)
    places = write_files(run, data, store)
    if as_json:
        print(json.dumps({"name": run.study.name, **asdict(run.shared), **places}))
        return
    console = Console(highlight=False)
    console.print(study_lines(data))
    console.print(" ".join(shared_words(run.shared)))
    for what, place in places.items():
        console.print(f"{what}: {place}", soft_wrap=True)


def data_of(run: StudyRun) -> StudyData:
    """The data of page, figure and terminal. Raises `DataError` if rows of the study are missing."""
    from sdft_ray.report.study.gather import gather_study

    return gather_study(
        run.rows,
        name=run.study.name,
        description=run.study.description,
        created=datetime.now(UTC).isoformat(timespec="minutes"),
        shared=shared_words(run.shared),
        yaml=run.yaml,
    )


def write_files(run: StudyRun, data: StudyData, store: Store) -> dict[str, str]:
    """Write rows, page, figure and table, replacing those of an earlier run. Returns label -> path."""
    from sdft_ray.report.study.figures import study_figure
    from sdft_ray.report.study.page import render_study
    from sdft_ray.report.study.tables import study_markdown

    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / FIGURE
        study_figure(data, drawn)
        files = {
            "Rows": (ROWS, rows_file(run.rows)),
            "Page": (PAGE, render_study(data).encode()),
            "Figure": (FIGURE, drawn.read_bytes()),
            "Table": (TABLE, study_markdown(data).encode()),
        }
    return {what: store.write_study(run.study.name, name, content) for what, (name, content) in files.items()}


def shared_words(shared: Shared) -> tuple[str, ...]:
    """Sentences on how many artifacts the recipes share, on the time they took, and on tasks left out."""
    left_out = ", ".join(f"{task} ({why})" for task, why in shared.left_out.items())
    return (
        f"{shared.num_steps:,} steps of {shared.num_recipes:,} recipes share {shared.num_artifacts:,} artifacts; "
        f"this run computed {shared.num_made:,} of them.",
        f"One after another, all of them took {seconds(shared.wall_s)}.",
        *([f"Tasks in no mean: {left_out}."] if left_out else []),
    )
