"""The trials of an arm as a table: a row per learning rate, a column per seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdft_ray.report.run.model import Grid, ReportData, TrialRow
from sdft_ray.report.toolbox.numbers import nats, rate


@dataclass(frozen=True)
class GridRow:
    """One rate: its trials by seed, None where there was none, and their mean where all have a loss, else ""."""

    rate: str
    trials: tuple[TrialRow | None, ...]
    mean: str
    chosen: bool


@dataclass(frozen=True)
class GridTable:
    """One arm. `means`: the column of means says something, because there are several seeds."""

    arm: str
    grid: Grid
    seeds: tuple[int, ...]
    rows: tuple[GridRow, ...]
    means: bool
    lost: tuple[str, ...]
    """Why trials diverged, each with its rate and seed."""


def grid_tables(data: ReportData) -> list[GridTable]:
    """One table per arm with several trials."""
    return [_table(arm, grid) for arm, grid in data.grids.items()]


def _table(arm: str, grid: Grid) -> GridTable:
    seeds = tuple(dict.fromkeys(trial.seed for trial in grid.trials))
    rates = dict.fromkeys(trial.learning_rate for trial in grid.trials)
    found = {(trial.learning_rate, trial.seed): trial for trial in grid.trials}
    rows = tuple(_row(value, [found.get((value, seed)) for seed in seeds]) for value in rates)
    lost = tuple(
        f"{rate(trial.learning_rate)}, seed {trial.seed}: {trial.reason}" for trial in grid.trials if trial.reason
    )
    return GridTable(arm, grid, seeds, rows, len(seeds) > 1, lost)


def _row(value: float, trials: list[TrialRow | None]) -> GridRow:
    losses = [trial.held_out_loss for trial in trials if trial is not None and trial.held_out_loss is not None]
    mean = nats(math.fsum(losses) / len(losses)) if losses and len(losses) == len(trials) else ""
    return GridRow(rate(value), tuple(trials), mean, any(trial is not None and trial.chosen for trial in trials))
