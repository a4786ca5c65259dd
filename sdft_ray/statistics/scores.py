"""The result of an evaluation: one score per task, with the values of its items. Plain values, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """One generated response, for inspection. `filtered` is the part that was compared with `target`."""

    item: str
    prompt: str
    response: str
    filtered: str
    target: str
    value: float


@dataclass(frozen=True)
class GenerationStats:
    """Statistics of generated answers, right or wrong. Shares are of `num_answers`, in [0, 1].

    `truncated` answers reached the limit of new tokens. From `no_answer` the task's own filter extracted nothing: a
    failure of format, apart from wrong answers. `repetition` is the mean share of 4-token sequences that occurred
    earlier in the same answer (seq-rep-4, arXiv:1908.04319). `pass_at_k` maps k, as text, to the chance that one
    of k sampled answers is right (arXiv:2107.03374, equation 1), where the evaluation sampled.
    """

    num_answers: int
    mean_tokens: float
    truncated: float
    no_answer: float
    repetition: float
    pass_at_k: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScore:
    """The primary metric of one task.

    `value` is as lm-eval gives it, divided by `scale`, in [0, 1] for accuracies; `stderr` is that of `value`, None
    where lm-eval has none. `items` maps an item (its index in the test split; `subtask/index` in a group) to its own
    value, 0 or 1 for accuracies, and is empty for metrics that exist only over the whole set. `chance` is what
    guessing scores: the mean of 1 / number of options, 0 for generated answers, None where it is unknown.
    `num_fewshot` is None for a group whose tasks have different numbers.
    `num_truncated` counts requests (an option of an item is one) whose prompt lost its beginning because the context
    was too short for it. `written` is there for generation tasks alone. `scale` is what a perfect answer scores in
    lm-eval: 1, or 100 for BLEU and chrF; None where that is not known.
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
    num_truncated: int = 0
    written: GenerationStats | None = None
    scale: float | None = 1.0

    @property
    def not_averaged(self) -> str | None:
        """Why the score cannot be averaged with those of other tasks; None where it can."""
        if not self.higher_is_better:
            return f"lower is better for {self.metric}"
        return None if self.scale is not None else f"the scale of {self.metric} is not known"


def is_share(values: Iterable[float]) -> bool:
    """Whether all values lie in [0, 1], those that are numbers."""
    return all(0 <= value <= 1 for value in values if math.isfinite(value))


@dataclass(frozen=True)
class Scores:
    """Scores of one model by task, in the order asked for, and the version of lm-eval that gave them ("" unknown).

    `num_truncated` is the sum over tasks: lm-eval cuts prompts without failing.
    """

    tasks: dict[str, TaskScore]
    num_truncated: int = 0
    harness: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scores:
        """The inverse of `to_json`."""
        tasks = {}
        for name, fields in data["tasks"].items():
            written = fields.get("written")
            parts = {
                "outputs": tuple(Output(**output) for output in fields["outputs"]),
                "written": GenerationStats(**written) if written else None,
            }
            if "scale" not in fields:  # written by an earlier version
                parts["scale"] = 1.0 if is_share([fields["value"], *fields["items"].values()]) else None
            tasks[name] = TaskScore(**{**fields, **parts})
        return cls(tasks, data["num_truncated"], data.get("harness", ""))
