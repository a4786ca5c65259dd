"""From a study's table, one row per student and task, to the plain values that its page shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sdft_ray.errors import DataError
from sdft_ray.report.study.fit import fit_arm, recovery_moves
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, TUNED, Cell, Fit, Panel, Pruned, StudyData
from sdft_ray.statistics.crossed import Array, CrossedEstimate, crossed_difference, crossed_mean, crossed_recovery
from sdft_ray.statistics.estimate import Estimate

NEEDED = (
    "variant", "metric", "remove_blocks", "num_blocks", "arm", "num_rows", "seed", "learning_rate", "task", "tuned",
    "score", "teacher_score", "pruned_score", "items", "teacher_items",
)  # fmt: skip
"""Columns that the page is made of; they hold no nulls."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Students:
    """One arm at one size: rows by (seed, task), and per task the values of S seeds on I items, (S, I)."""

    arm: str
    num_rows: int
    seeds: tuple[int, ...]
    rows: dict[tuple[int, str], Row]
    items: dict[str, Array]


def gather_study(
    rows: pa.Table,
    *,
    name: str,
    title: str = "",
    description: str = "",
    created: str = "",
    shared: Sequence[str] = (),
    yaml: str = "",
) -> StudyData:
    """Panels and arms in the order of the table; the first arm is what the others are compared with.

    An arm whose own recipe fixes the metric stands beside the others under every metric that the study varies. Raises
    `DataError` for a table that is no whole study.
    """
    records = _records(rows)
    students = {(r["variant"], r["metric"], r["remove_blocks"], r["arm"], r["num_rows"], r["seed"]) for r in records}
    varied = _varied_metrics(records)
    arms = tuple(dict.fromkeys(row["arm"] for row in records))
    panels = []
    for variant, blocks in dict.fromkeys((row["variant"], row["remove_blocks"]) for row in records):
        inside = [row for row in records if (row["variant"], row["remove_blocks"]) == (variant, blocks)]
        for metric in varied or ("",):
            chosen = [row for row in inside if row["metric"] == metric or row["metric"] not in varied]
            panels.append(_panel(variant, metric, arms, chosen))
    return StudyData(name, tuple(panels), title, description, created, tuple(shared), yaml, len(students))


def _records(table: pa.Table) -> list[Row]:
    """Rows as dictionaries, their items as float64 arrays."""
    missing = [column for column in NEEDED if column not in table.column_names]
    if missing or not table.num_rows:
        what = f"has no column {missing[0]!r}" if missing else "has no rows"
        raise DataError(f"the study's table {what}", "write it again with the study's runner")
    for column in NEEDED:
        if table.column(column).null_count:
            raise DataError(f"the study's table has nulls in {column!r}", "write it again with the study's runner")
    columns = {column: table.column(column).to_pylist() for column in NEEDED if "items" not in column}
    columns |= {column: _arrays(table.column(column)) for column in ("items", "teacher_items")}
    records: list[Row] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in records:
        figures = (*row["items"], *row["teacher_items"], row["score"], row["teacher_score"], row["pruned_score"])
        if len(row["items"]) != len(row["teacher_items"]) or not np.isfinite(figures).all():
            raise DataError(
                f"{row['arm']} at {row['num_rows']:,} rows, seed {row['seed']}, has no whole values on {row['task']!r}",
                "evaluate it again: teacher and student need a finite value for every item",
            )
    return records


def _arrays(column: pa.ChunkedArray) -> list[Array]:
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    return np.split(lists.flatten().to_numpy(zero_copy_only=False).astype(float), np.cumsum(lengths)[:-1])


def _varied_metrics(records: Sequence[Row]) -> tuple[str, ...]:
    """The metrics of arms that have several; () where every arm has one."""
    by_arm: dict[str, dict[str, None]] = {}
    for row in records:
        by_arm.setdefault(row["arm"], {})[row["metric"]] = None
    return tuple(dict.fromkeys(metric for metrics in by_arm.values() if len(metrics) > 1 for metric in metrics))


def _panel(variant: str, metric: str, order: Sequence[str], records: Sequence[Row]) -> Panel:
    by_task = {row["task"]: row for row in records}
    tasks = tuple(sorted(by_task, key=lambda task: not by_task[task]["tuned"]))
    tuned = tuple(task for task in tasks if by_task[task]["tuned"])
    groups = {ALL: tasks}
    if 0 < len(tuned) < len(tasks):
        groups |= {TUNED: tuned, OFF_DOMAIN: tasks[len(tuned) :]}
    present = {row["arm"] for row in records}
    arms = tuple(arm for arm in order if arm in present)
    teacher = {task: by_task[task]["teacher_items"] for task in tasks}
    _check_teacher(records, teacher, groups)
    sizes = sorted({row["num_rows"] for row in records})
    every = [_students(arm, n, tasks, records) for n in sizes for arm in arms]
    students = {(part.arm, part.num_rows): part for part in every if part.seeds}
    _check_seeds(list(students.values()))
    measured = {group: _Measured(students, teacher, part) for group, part in groups.items()}
    scores = {task: by_task[task]["teacher_score"] for task in tasks}
    return Panel(
        variant=variant,
        metric=metric,
        remove_blocks=records[0]["remove_blocks"],
        num_blocks=records[0]["num_blocks"] + records[0]["remove_blocks"],
        arms=arms,
        tasks=tasks,
        tuned=tuned,
        teacher=scores,
        teacher_average=statistics.fmean(scores.values()),
        pruned=_pruned(arms, scores, groups, records),
        cells=tuple(_cell(part, arms[0], measured) for part in students.values()),
        fits={(arm, group): part.fit(arm) for arm in arms for group, part in measured.items()},
    )


def _students(arm: str, num_rows: int, tasks: Sequence[str], records: Sequence[Row]) -> Students:
    mine = [row for row in records if (row["arm"], row["num_rows"]) == (arm, num_rows)]
    rows = {(row["seed"], row["task"]): row for row in mine}
    seeds = tuple(sorted({row["seed"] for row in mine}))
    if not len(mine) == len(rows) == len(seeds) * len(tasks):
        raise DataError(
            f"{arm} at {num_rows:,} rows does not have every task once for every seed",
            "evaluate all students on the same tasks, and hand over each once",
        )
    items = {task: np.stack([rows[seed, task]["items"] for seed in seeds]) for task in tasks} if seeds else {}
    return Students(arm, num_rows, seeds, rows, items)


def _check_teacher(records: Sequence[Row], teacher: Mapping[str, Array], groups: Mapping[str, Sequence[str]]) -> None:
    for row in records:
        if not np.array_equal(row["teacher_items"], teacher[row["task"]]):
            raise DataError(
                f"the teacher’s values on {row['task']!r} are not the same for all students", "evaluate once"
            )
    for group, tasks in groups.items():
        if not np.mean([teacher[task].mean() for task in tasks]) > 0:
            raise DataError(f"the teacher scores nothing ({group}), so recovery is undefined", "evaluate other tasks")


def _check_seeds(students: Sequence[Students]) -> None:
    first = students[0]
    for other in students:
        if other.seeds != first.seeds:
            raise DataError(
                f"{first.arm} at {first.num_rows:,} rows has the seeds {first.seeds}, {other.arm} at "
                f"{other.num_rows:,} rows {other.seeds}",
                "train every arm at every size with the same seeds: comparisons are paired by seed",
            )


class _Measured:
    """Recoveries over one group of tasks, by arm and size."""

    def __init__(
        self, students: Mapping[tuple[str, int], Students], teacher: Mapping[str, Array], tasks: Sequence[str]
    ) -> None:
        answers = {task: teacher[task] for task in tasks}
        items = {key: {task: part.items[task] for task in tasks} for key, part in students.items()}
        self.recovery = {key: crossed_recovery(tables, answers) for key, tables in items.items()}
        self._moves = {key: recovery_moves(tables, answers) for key, tables in items.items()}

    def ahead(self, arm: str, first: str, num_rows: int) -> CrossedEstimate | None:
        """The arm's recovery less the first arm's; None where there is no such pair."""
        if arm == first or (first, num_rows) not in self._moves:
            return None
        return crossed_difference(self._moves[first, num_rows], self._moves[arm, num_rows])

    def fit(self, arm: str) -> Fit:
        keys = sorted(key for key in self.recovery if key[0] == arm and key[1] > 0)
        return fit_arm(
            [num_rows for _, num_rows in keys], [self.recovery[key] for key in keys], [self._moves[key] for key in keys]
        )


def _cell(part: Students, first: str, measured: Mapping[str, _Measured]) -> Cell:
    tasks = tuple(part.items)
    scores = {task: statistics.fmean(part.rows[seed, task]["score"] for seed in part.seeds) for task in tasks}
    ahead = {group: result.ahead(part.arm, first, part.num_rows) for group, result in measured.items()}
    return Cell(
        arm=part.arm,
        num_rows=part.num_rows,
        num_seeds=len(part.seeds),
        learning_rates=tuple(sorted({row["learning_rate"] for row in part.rows.values()})),
        scores=scores,
        margins=_margins(part.items),
        average=statistics.fmean(scores.values()),
        recovery={group: _estimate(result.recovery[part.arm, part.num_rows]) for group, result in measured.items()},
        ahead={group: _estimate(result) for group, result in ahead.items() if result is not None},
    )


def _margins(items: Mapping[str, Array]) -> dict[str, float]:
    result = {task: crossed_mean({task: table}) for task, table in items.items()}
    return {
        task: (one.high - one.low) / 2 for task, one in result.items() if one.low is not None and one.high is not None
    }


def _pruned(
    arms: Sequence[str], teacher: Mapping[str, float], groups: Mapping[str, Sequence[str]], records: Sequence[Row]
) -> tuple[Pruned, ...]:
    """Arms that start from the same scores share a baseline."""
    by_arm: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    for row in records:
        by_arm[row["arm"]][row["task"]] = row["pruned_score"]
    shared: dict[tuple[float, ...], list[str]] = {}
    for arm, result in by_arm.items():
        shared.setdefault(tuple(result[task] for task in teacher), []).append(arm)
    return tuple(_baseline(tuple(named), by_arm[named[0]], teacher, groups) for named in shared.values())


def _baseline(
    arms: tuple[str, ...],
    scores: Mapping[str, float],
    teacher: Mapping[str, float],
    groups: Mapping[str, Sequence[str]],
) -> Pruned:
    known = {task: scores[task] for task in teacher}
    recovery = {
        group: sum(known[task] for task in tasks) / sum(teacher[task] for task in tasks)
        for group, tasks in groups.items()
    }
    return Pruned(arms, known, statistics.fmean(known.values()), recovery)


def _estimate(result: CrossedEstimate) -> Estimate:
    assert result.value is not None, "the teacher’s mean is above 0"
    return Estimate(result.value, result.stderr, result.low, result.high, "crossed")
