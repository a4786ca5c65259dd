"""What an evaluation returns: one score per task, with the items behind it. Plain values, JSON in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Output:
    """One generated response, to be looked at. `filtered` is what was compared with `target`."""

    item: str
    prompt: str
    response: str
    filtered: str
    target: str
    value: float


@dataclass(frozen=True)
class TaskScore:
    """The primary metric of one task.

    `value` is as lm-eval gives it, in [0, 1] for accuracies; `stderr` is that of `value`, None where lm-eval
    has none. `items` maps an item (its index in the test split; `subtask/index` in a group) to its own value,
    0 or 1 for accuracies, and is empty for metrics that exist only over the whole set. `chance` is what
    guessing scores: the mean of 1 / number of options, 0 for generated answers, None where it cannot be told.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    num_fewshot: int | None
    higher_is_better: bool
    chance: float | None
    items: dict[str, float]
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Scores of one model by task, in the order asked for.

    `num_truncated` counts requests (an option of an item is one) whose prompt lost its beginning because the context
    was too short for it, which lm-eval does without failing.
    """

    tasks: dict[str, TaskScore]
    num_truncated: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        """The inverse of `to_json`."""
        tasks = {}
        for name, fields in data["tasks"].items():
            outputs = tuple(Output(**output) for output in fields["outputs"])
            tasks[name] = TaskScore(**{**fields, "outputs": outputs})
        return cls(tasks, data["num_truncated"])
