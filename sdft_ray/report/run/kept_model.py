"""What students kept, as plain values: the retention card and the judgement, as `evaluation.card` defines the figures.

Light to import: the terminal shows them too.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    """Frozen and strict, without NaN and infinities, as all parts of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Part):
    """A figure with its standard error; None where it is undefined or cannot be had."""

    value: float | None
    stderr: float | None = None


class Bounded(_Part):
    """A figure with its 95 % interval; None where it is undefined or cannot be told."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Beside(Bounded):
    """The student less another model, in units of the metric, paired by item.

    `p_value` is McNemar's exact one, where items are right or wrong.
    """

    p_value: float | None = None


class Answers(_Part):
    """How a model's generated answers look, right or wrong, as `statistics.scores.Written` defines it."""

    num_answers: int
    mean_tokens: float
    truncated: float
    no_answer: float
    repetition: float
    pass_at_k: dict[str, float] = {}


class KeptTask(_Part):
    """One task: scores, what of them is recovered, and the student beside both others. `answers` is by model.

    `is_share`: the score is a share of something good, and can be told in per cent. `is_right_or_wrong`: every item is.
    """

    task: str
    metric: str
    num_items: int
    is_generative: bool = False
    is_tuned: bool = False
    is_share: bool = True
    is_right_or_wrong: bool = False
    teacher: Figure
    pruned: Figure
    student: Figure
    recovery: Figure
    chance_corrected: Figure
    from_teacher: Beside
    from_pruned: Beside
    answers: dict[str, Answers] = {}

    @property
    def scores(self) -> dict[str, Figure]:
        """By model."""
        return {"teacher": self.teacher, "pruned": self.pruned, "student": self.student}


class KeptCapability(_Part):
    """Mean scores over the tasks of one capability that are answered in one way, and their ratio."""

    capability: str
    is_generative: bool
    tasks: tuple[str, ...]
    teacher: Figure
    pruned: Figure
    student: Figure
    recovery: Figure


class Overall(_Part):
    """Mean score over the teacher's mean score, with its 95 % interval, and beside it the ratio of the worst task."""

    mean: Figure
    low: float | None = None
    high: float | None = None
    min: Figure
    min_task: str | None = None
    left_out: tuple[str, ...] = ()
    """Tasks that no ratio can be built of."""


class Kept(_Part):
    """One student. `reversals`: task on which it is worse than the pruned model -> whether beyond chance, None where
    that cannot be told."""

    tasks: tuple[KeptTask, ...]
    capabilities: tuple[KeptCapability, ...]
    recovery: Overall
    chance_corrected: Overall
    pruned: Figure
    """Mean recovery before fine-tuning."""
    reversals: dict[str, bool | None] = {}


class Judgement(_Part):
    """Whether a student keeps to the bounds of its recipe; a reason for each that it misses, in a sentence."""

    releasable: bool
    reasons: tuple[str, ...] = ()


class Lead(_Part):
    """By how much the mean score of the best arm is above that of the next best, paired by item."""

    best: str
    next_best: str
    difference: Bounded


class Retention(_Part):
    """All students of a run. `judgements` is empty where the recipe has no bounds; `bounds` are these in words."""

    students: dict[str, Kept] = {}
    incomparable: dict[str, str] = {}
    """Students that cannot be compared with teacher and pruned model, and why."""
    judgements: dict[str, Judgement] = {}
    bounds: tuple[str, ...] = ()
    lead: Lead | None = None


class Truncation(_Part):
    """Task -> requests whose prompt lost its beginning. `context_tokens` is what prompt and answer had to fit into."""

    tasks: dict[str, int]
    context_tokens: int | None = None
