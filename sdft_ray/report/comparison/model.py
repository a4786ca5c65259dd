"""Models side by side, as plain values: what `sdft compare` found, for tables, page and machines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdft_ray.statistics.estimate import Estimate

Kind = Literal["generation", "choice", "other"]
KINDS: dict[Kind, str] = {
    "generation": "Generation",
    "choice": "Multiple choice",
    "other": "Other metrics",
}
"""How a task is answered. `choice` is all that is scored by likelihood; `other` are metrics that are no share of right
answers, or better when lower: they stand for themselves and enter no mean."""
SURE = 0.05
"""Tasks whose p-value is below this after Holm's correction count as clearly different."""


@dataclass(frozen=True)
class Model:
    """An evaluated model. `name` is what tables call it, `address` the artifact of its evaluation.

    `has_answers`: the evaluation kept what the model answered, item by item.
    """

    run: str
    role: str
    name: str
    address: str
    created: str = ""
    has_answers: bool = False


@dataclass(frozen=True)
class Flips:
    """How many items of a task are right in both models, in one alone, or in neither; exact McNemar test, two-sided."""

    num_both: int
    num_only_baseline: int
    num_only_other: int
    num_neither: int
    p_value: float


@dataclass(frozen=True)
class Change:
    """Another model's score less the baseline's, in units of the metric, and an interval paired by item.

    `low` and `high` are None where there is no value per item. `flips` is there for single tasks whose items are right
    or wrong. `is_clear`: a task's p-value holds after Holm's correction over all tasks of the pair; of a mean: its
    interval does not hold 0.
    """

    value: float
    low: float | None = None
    high: float | None = None
    flips: Flips | None = None
    is_clear: bool = False


@dataclass(frozen=True)
class Answers:
    """How one model's generated answers to a task look. Right, wrong and without an answer add up to all of them.

    `num_no_answer` are those out of which the task's own filter took nothing: failures of format, not wrong ones.
    `num_truncated` ended at the limit of new tokens, right or wrong; None where it was not recorded.
    """

    num_right: int
    num_wrong: int
    num_no_answer: int
    num_truncated: int | None = None
    mean_tokens: float | None = None


@dataclass(frozen=True)
class Row:
    """The plain mean over `tasks`: `scores` in the order of the models, `changes` in that of all but the baseline."""

    name: str
    tasks: tuple[str, ...]
    scores: tuple[Estimate, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class TaskRow(Row):
    """One task. `answers` in the order of the models, None where they were not kept or are not right or wrong."""

    kind: Kind
    capability: str
    metric: str
    num_items: int
    num_fewshot: int | None
    chance: float | None
    answers: tuple[Answers | None, ...]


@dataclass(frozen=True)
class Response:
    """What one model answered. `filtered` is what the task's filter took out of it and compared with the target."""

    text: str
    filtered: str
    truncated: bool = False
    no_answer: bool = False


@dataclass(frozen=True)
class Example:
    """One item that the baseline (`before`) and the model `other` (`after`) do not both get right.

    `won`: from wrong to right; else from right to wrong. `prompt` may lack its beginning.
    """

    other: str
    task: str
    item: str
    won: bool
    prompt: str
    target: str
    before: Response
    after: Response


@dataclass(frozen=True)
class Comparison:
    """Models side by side on the same items; the first is the baseline. Scores are fractions, and so are changes.

    `means` has a row for each kind of task, `capabilities` for each capability, `overall` over all tasks of both kinds,
    None where there are none. `level` is that of all intervals. `harness` is the version of lm-eval, "" if unknown.
    """

    models: tuple[Model, ...]
    tasks: tuple[TaskRow, ...]
    means: tuple[Row, ...]
    capabilities: tuple[Row, ...]
    overall: Row | None
    examples: tuple[Example, ...] = ()
    level: float = 0.95
    harness: str = ""

    @property
    def baseline(self) -> Model:
        return self.models[0]

    @property
    def others(self) -> tuple[Model, ...]:
        return self.models[1:]

    @property
    def without_answers(self) -> tuple[str, ...]:
        """Models that were evaluated before answers were kept."""
        return tuple(model.name for model in self.models if not model.has_answers)

    @property
    def kinds(self) -> dict[Kind, tuple[TaskRow, ...]]:
        """Tasks by kind; kinds without tasks are left out."""
        result: dict[Kind, tuple[TaskRow, ...]] = {
            kind: tuple(task for task in self.tasks if task.kind == kind) for kind in KINDS
        }
        return {kind: tasks for kind, tasks in result.items() if tasks}

    def to_json(self) -> str:
        """One object; figures that are not finite become null."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
