"""Simulated worlds in which the truth is known, and how often 95 % intervals of an evaluation contain it.

A model answers an item correctly with probability sigmoid(ability - difficulty). The difficulty of an item is normal
and the same for all models (logistic-normal), so their answers are correlated. Where students come from several
training seeds, a seed also shifts the whole student, each task on its own, and each item. Abilities are set so that the
means over items and seeds are exactly those given. Each world draws items, seeds and answers anew; then the interval
of the package, at default settings, contains the true difference, ratio or mean, or it does not.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from sdft_ray.statistics.crossed import CrossedEstimate, crossed_difference, crossed_mean, crossed_recovery
from sdft_ray.statistics.paired import Interval, paired_bootstrap, recovery_interval
from sdft_ray.statistics.scores import Scores, TaskScore

Array = NDArray[np.float64]

BOUND_LOW, BOUND_HIGH = 0.93, 0.97
"""Of the coverage; the upper one does not bind a world that `may_exceed` it."""
DIFFICULTY = 2.0
"""Standard deviation over items, in logits, unless a world says otherwise."""

ITEMS = tuple(map(str, range(2000)))
"""Names of items; no task has more."""


@dataclass(frozen=True)
class Paired:
    """Teacher and student on tasks of (number of items, teacher's mean, student's mean)."""

    figure: str
    tasks: tuple[tuple[int, float, float], ...]
    difficulty: float = DIFFICULTY
    chance: float = 0.0
    """Above 0 for a chance-corrected recovery."""
    graded: bool = False
    """Values are the probabilities themselves, with a noise of each model's own, in place of right and wrong."""
    may_exceed: bool = False
    """Too little differs for an interval that holds the truth in 95 % of cases and no more."""

    def holds(self, random: np.random.Generator, draws: int) -> bool:
        found = [self._task(random, *task) for task in self.tasks]
        scores = [{f"task_{at}": pair[model] for at, pair in enumerate(found)} for model in (0, 1)]
        teacher, student = (scored(part, self.chance) for part in scores)
        teacher_mean, student_mean = (float(np.mean([task[model] for task in self.tasks])) for model in (1, 2))
        if self.figure == "difference":
            return within(paired_bootstrap(teacher, student, draws=draws), student_mean - teacher_mean)
        truth = (student_mean - self.chance) / (teacher_mean - self.chance)
        corrected = self.chance > 0
        return within(recovery_interval(teacher, student, chance_corrected=corrected, draws=draws), truth)

    def _task(self, random: np.random.Generator, num_items: int, *means: float) -> Array:
        """(2, I): teacher and student."""
        difficulty_I = random.normal(0, self.difficulty, num_items)
        own_2I = random.normal(0, 1, (2, num_items)) if self.graded else np.zeros((2, num_items))
        ability_2 = [ability(mean, math.hypot(self.difficulty, 1.0 if self.graded else 0.0)) for mean in means]
        right_2I = expit(np.array(ability_2)[:, None] - difficulty_I + own_2I)
        return right_2I if self.graded else (random.random((2, num_items)) < right_2I).astype(float)


@dataclass(frozen=True)
class Seeds:
    """Students of several seeds, of mean `student` on `num_tasks` tasks, and the teacher or a second arm."""

    figure: str
    num_seeds: int
    seed: float
    """Standard deviation over seeds, in logits, of what they do to all tasks; 1.5 times as much to each task."""
    num_tasks: int = 7
    num_items: int = 200
    teacher: float = 0.95
    student: float = 0.8
    other: float = 0.83
    """The second arm's mean, for a difference."""
    difficulty: float = DIFFICULTY
    item: float = 0.5
    """Standard deviation over items, in logits, of what they are to an arm beyond their difficulty."""
    may_exceed: bool = False

    def holds(self, random: np.random.Generator, draws: int) -> bool:
        difficulty_TI = random.normal(0, self.difficulty, (self.num_tasks, self.num_items))
        # Two arms of one seed see the same rows in the same order, and share part of what a seed does.
        shared_S = random.normal(0, self.seed, self.num_seeds)
        students = self._arm(random, self.student, difficulty_TI, shared_S)
        if self.figure == "mean":
            return within(crossed_mean(students), self.student)
        if self.figure == "difference":
            others = self._arm(random, self.other, difficulty_TI, shared_S)
            return within(crossed_difference(students, others), self.other - self.student)
        chance_TI = expit(ability(self.teacher, self.difficulty) - difficulty_TI)
        right_TI = (random.random(chance_TI.shape) < chance_TI).astype(float)
        teacher = {task: right_TI[at] for at, task in enumerate(students)}
        return within(crossed_recovery(students, teacher), self.student / self.teacher)

    def _arm(self, random: np.random.Generator, mean: float, difficulty_TI: Array, shared_S: Array) -> dict[str, Array]:
        own, item = 0.5 * self.seed, self.item
        seed_S = shared_S + random.normal(0, own, self.num_seeds)
        seed_ST = seed_S[:, None] + random.normal(0, 1.5 * self.seed, (self.num_seeds, self.num_tasks))
        arm_TI = difficulty_TI + random.normal(0, item, difficulty_TI.shape)
        spread = math.sqrt(self.difficulty**2 + item**2 + self.seed**2 + own**2 + (1.5 * self.seed) ** 2)
        chance_STI = expit(ability(mean, spread) + seed_ST[..., None] - arm_TI)
        right_STI = (random.random(chance_STI.shape) < chance_STI).astype(float)
        return {f"task_{task}": right_STI[:, task] for task in range(self.num_tasks)}


World = Paired | Seeds

SEVEN = tuple((200, teacher, student) for teacher, student in zip(
    (0.95, 0.99, 0.98, 0.9, 0.95, 0.97, 0.93), (0.75, 0.9, 0.95, 0.7, 0.85, 0.9, 0.55), strict=True
))  # fmt: skip
"""Near the laboratory's teacher and its student."""
UNEQUAL = tuple(zip(
    (100, 1500, 300, 800, 150, 600), (0.6, 0.82, 0.65, 0.5, 0.75, 0.8), (0.5, 0.75, 0.55, 0.45, 0.7, 0.4), strict=True
))  # fmt: skip
WORLDS: dict[str, World] = {
    "difference, 200 items, 0.95 and 0.80": Paired("difference", ((200, 0.95, 0.8),)),
    "difference, 100 items, 0.95 and 0.80": Paired("difference", ((100, 0.95, 0.8),)),
    "difference, 200 items, 0.95 and 0.50": Paired("difference", ((200, 0.95, 0.5),)),
    "difference, 100 items, 0.50 and 0.50": Paired("difference", ((100, 0.5, 0.5),)),
    "difference, 150 items, 0.97 and 0.95": Paired("difference", ((150, 0.97, 0.95),)),
    "difference, 200 items, 0.02 and 0.06": Paired("difference", ((200, 0.02, 0.06),)),
    "difference, 200 items, 0.90 and 0.88, alike": Paired("difference", ((200, 0.9, 0.88),), difficulty=8.0),
    "difference, 100 items, 0.99 and 0.97, sparse": Paired("difference", ((100, 0.99, 0.97),), may_exceed=True),
    "difference, 200 items, 0.990 and 0.985, sparse": Paired("difference", ((200, 0.99, 0.985),), may_exceed=True),
    "difference, 150 items, graded": Paired("difference", ((150, 0.6, 0.5),), graded=True),
    "difference, 7 tasks of 200": Paired("difference", SEVEN),
    "difference, 6 tasks of 100 to 1,500": Paired("difference", UNEQUAL),
    "recovery, 200 items, 0.95 and 0.80": Paired("recovery", ((200, 0.95, 0.8),)),
    "recovery, 200 items, 0.95 and 0.50": Paired("recovery", ((200, 0.95, 0.5),)),
    "recovery, 100 items, 0.30 and 0.25": Paired("recovery", ((100, 0.3, 0.25),)),
    "recovery, 7 tasks of 200": Paired("recovery", SEVEN),
    "chance-corrected, 200 items, 0.95 and 0.80 of 4 options": Paired("recovery", ((200, 0.95, 0.8),), chance=0.25),
    "chance-corrected, 200 items, 0.45 and 0.35 of 4 options": Paired("recovery", ((200, 0.45, 0.35),), chance=0.25),
    "crossed mean, 5 seeds": Seeds("mean", 5, seed=0.1),
    "crossed mean, 3 seeds": Seeds("mean", 3, seed=0.1),
    "crossed mean, 5 seeds that matter a lot": Seeds("mean", 5, seed=0.4),
    "crossed mean, 3 seeds that matter a lot": Seeds("mean", 3, seed=0.4),
    "crossed mean, 5 seeds, one task": Seeds("mean", 5, seed=0.1, num_tasks=1),
    "crossed mean, 3 seeds that do not matter": Seeds("mean", 3, seed=0.0),
    "crossed mean, 2 seeds": Seeds("mean", 2, seed=0.1, may_exceed=True),
    "crossed mean, 1 seed that does not matter": Seeds("mean", 1, seed=0.0),
    "crossed mean, 5 seeds, items that do not matter": Seeds("mean", 5, seed=0.1, difficulty=0.0, item=0.0),
    "crossed mean, 5 seeds, one task, items that do not matter": Seeds(
        "mean", 5, seed=0.1, num_tasks=1, difficulty=0.0, item=0.0
    ),
    "crossed mean, 3 seeds, one task, items that do not matter": Seeds(
        "mean", 3, seed=0.1, num_tasks=1, difficulty=0.0, item=0.0
    ),
    "crossed mean, 5 seeds, 0.50": Seeds("mean", 5, seed=0.1, student=0.5),
    "crossed difference, 5 seeds": Seeds("difference", 5, seed=0.1),
    "crossed difference, 3 seeds": Seeds("difference", 3, seed=0.1),
    "crossed recovery, 5 seeds": Seeds("recovery", 5, seed=0.1),
    "crossed recovery, 3 seeds": Seeds("recovery", 3, seed=0.1),
}


@functools.cache
def ability(mean: float, spread: float) -> float:
    """a such that sigmoid(a + spread z) has this mean over standard normal z, by a sum over a fine grid."""
    z = np.linspace(-9, 9, 20_001)
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    root: float = brentq(lambda a: float(weights @ expit(a + spread * z)) - mean, -60, 60, xtol=1e-10)  # type: ignore[assignment]
    return root


def scored(tasks: dict[str, Array], chance: float) -> Scores:
    found = {}
    for task, value_I in tasks.items():
        items = dict(zip(ITEMS[: len(value_I)], value_I.tolist(), strict=True))
        found[task] = TaskScore(
            task, "acc", "none", float(value_I.mean()), None, len(value_I), 0, True, chance, items
        )  # fmt: skip
    return Scores(found)


def within(found: Interval | CrossedEstimate, truth: float) -> bool:
    """No limits are no limits: they hold everything. Up to rounding, for truths that are the end of a range."""
    low = -math.inf if found.low is None else found.low
    high = math.inf if found.high is None else found.high
    return low - 1e-9 <= truth <= high + 1e-9


def coverage(name: str, num_worlds: int, draws: int = 2000) -> float:
    """The share of worlds whose interval holds the truth. The same worlds for the same name and number."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return sum(WORLDS[name].holds(random, draws) for _ in range(num_worlds)) / num_worlds
