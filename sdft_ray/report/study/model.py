"""Everything that the page of a study shows, as plain values. Light to import: no numpy, no table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sdft_ray.statistics.estimate import Estimate

ALL, TUNED, OFF_DOMAIN = "all tasks", "tuned tasks", "off-domain"
"""Groups of tasks that are read together. Tuned ones are of the fine-tuning set's kind."""


@dataclass(frozen=True)
class Cell:
    """The students of one arm at one data-set size, one per seed.

    `scores` by task and their mean `average` are means over seeds, in [0, 1]; `margins` are half the widths of the
    scores' 95 % intervals, without an entry where nothing varies. `recovery` is mean score / teacher's mean score by
    group (arXiv:2410.09982), `ahead` that less the first arm's at the same size, {} where there is none.
    """

    arm: str
    num_rows: int
    num_seeds: int
    learning_rates: tuple[float, ...]
    scores: dict[str, float]
    margins: dict[str, float]
    average: float
    recovery: dict[str, Estimate]
    ahead: dict[str, Estimate]


@dataclass(frozen=True)
class Pruned:
    """The pruned model that `arms` start from, before any tuning."""

    arms: tuple[str, ...]
    scores: dict[str, float]
    average: float
    recovery: dict[str, float]


class LinePoint(NamedTuple):
    """The fitted recovery at a number of rows, and its 95 % interval."""

    num_rows: float
    value: float
    low: float
    high: float


class MoreRows(NamedTuple):
    """What `factor` times the largest size would bring; without values, the `reason` why none is predicted."""

    factor: float
    num_rows: int
    recovery: Estimate | None
    gain: Estimate | None
    reason: str = ""


@dataclass(frozen=True)
class Fit:
    """The curve of one arm over the sizes, or why there is none.

    `kind` is "curve" with an asymptote, "rising" without one, and else the reason why there is no curve: `line` and
    `more` are empty then, and `change` is by how much recovery moves from the smallest size to the largest.
    """

    kind: Literal["curve", "rising", "few", "flat", "falling"]
    note: str
    line: tuple[LinePoint, ...] = ()
    asymptote: Estimate | None = None
    more: tuple[MoreRows, ...] = ()
    change: Estimate | None = None


@dataclass(frozen=True)
class Panel:
    """One variant with one number of removed blocks: what its arms are compared within.

    `metric` is "" where the study has one for every arm; `num_blocks` is the teacher's. `cells` go by size, ascending,
    then by arm; `fits` by arm and group, of arms that were trained at all.
    """

    variant: str
    metric: str
    remove_blocks: int
    num_blocks: int
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    """Tuned ones first."""
    tuned: tuple[str, ...]
    teacher: dict[str, float]
    teacher_average: float
    pruned: tuple[Pruned, ...]
    cells: tuple[Cell, ...]
    fits: dict[tuple[str, str], Fit]

    @property
    def name(self) -> str:
        """Such as `word_problems, 4 of 12 blocks removed`."""
        blocks = f"{self.remove_blocks} of {self.num_blocks} blocks removed"
        return ", ".join(part for part in (self.variant, self.metric, blocks) if part)

    @property
    def groups(self) -> tuple[str, ...]:
        """All tasks alone where all are of one kind."""
        return (ALL, TUNED, OFF_DOMAIN) if 0 < len(self.tuned) < len(self.tasks) else (ALL,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.num_rows for cell in self.cells))

    def cell(self, arm: str, num_rows: int) -> Cell | None:
        return next((cell for cell in self.cells if (cell.arm, cell.num_rows) == (arm, num_rows)), None)

    def pruned_of(self, arm: str) -> Pruned:
        return next(pruned for pruned in self.pruned if arm in pruned.arms)


@dataclass(frozen=True)
class StudyData:
    """All that one page shows. Whatever is "" or empty is left out of it."""

    name: str
    panels: tuple[Panel, ...]
    title: str = ""
    description: str = ""
    created: str = ""
    """UTC, ISO 8601."""
    shared: tuple[str, ...] = ()
    """What the recipes shared and what the study took, in sentences."""
    yaml: str = ""
    num_students: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        """Of all panels, in the order in which they first stand."""
        return tuple(dict.fromkeys(arm for panel in self.panels for arm in panel.arms))
