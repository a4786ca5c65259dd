"""What the report of a run shows: evaluation's own values, and what was not measured. Missing parts are left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

from sdft_ray.evaluation import forgetting
from sdft_ray.evaluation.card import Card
from sdft_ray.evaluation.divergence import TeacherKl
from sdft_ray.evaluation.recovery import Recovery
from sdft_ray.evaluation.release import Judgement
from sdft_ray.evaluation.rounds import BatchSpeed, ModelSpeed
from sdft_ray.evaluation.shift import Shift
from sdft_ray.models.precision import EngineUse
from sdft_ray.models.size import ModelSize
from sdft_ray.statistics.estimate import Estimate, Interval

TEACHER, PRUNED = "teacher", "pruned"
"""Names of the two models that every comparison rests on; all others are arms."""
PATCHED = "patched"
"""The one model among the students that was not trained."""


class _Part(BaseModel):
    """Frozen and strict; NaN and infinities are refused, because no page can show them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sizes(_Part):
    """Before and after pruning."""

    teacher: ModelSize
    pruned: ModelSize


class Distances(_Part):
    """The scores of L blocks under the names of `importance.moments.DepthScores`, which loads numpy.

    `angular_*_LN[n - 1][l]`: angular distance in [0, 1] between the inputs of blocks l and l + n, n = 1..L-1,
    None (or absent) where l + n > L. `block_influence_L[l]`: 1 - mean cosine of a block's input and output.
    """

    angular_last_LN: tuple[tuple[float | None, ...], ...]
    angular_mean_LN: tuple[tuple[float | None, ...], ...]
    block_influence_L: tuple[float, ...]
    num_sequences: int | None = None
    num_tokens: int | None = None
    zero_tokens: dict[str, int] = {}

    @model_validator(mode="after")
    def _same_model(self) -> Self:
        expected = len(self.block_influence_L) - 1
        if len(self.angular_last_LN) != expected or len(self.angular_mean_LN) != expected:
            raise ValueError("distances need one row for each n from 1 to the number of blocks less one")
        return self


class CutCandidate(_Part):
    """A set of blocks that `metric: best` compared: the loss without it, in nats per response token.

    It is `beyond` that of the chosen set by >= 0, with a standard error over rows, None with a single one. `metrics`
    would have removed it, by the names of `pruning.proposals`.
    """

    blocks: tuple[int, ...]
    metrics: tuple[str, ...]
    loss: float
    beyond: float
    stderr: float | None


class Compared(_Part):
    """What the losses of candidates are of: `num_rows` calibration rows, on which the whole model has `whole_loss`."""

    whole_loss: float
    num_rows: int


class Stability(_Part):
    """How sure the choice of blocks is; fields as in `pruning.stability.Stability`, which loads numpy."""

    share: float
    runner_up: tuple[int, ...]
    difference: float
    stderr: float
    num_parts: int


class Plan(_Part):
    """The blocks that stay, 0-based, and how they were chosen.

    `position` is "last" or "mean" where `metric` is the angular distance, else "". `widths` has, for every channel
    space that shrank, how many members stayed and of how many. `residuals` has, for every patch, its block in the
    pruned model and the squared error of the residual stream behind the cut before and after, as shares of the
    stream's square. `candidates` and `compared` are for `metric: best`. `stability` is None where it was not measured.
    """

    num_blocks: int
    keep_blocks: tuple[int, ...]
    metric: str = ""
    position: str = ""
    widths: dict[str, tuple[int, int]] = {}
    residuals: tuple[tuple[int, float, float], ...] = ()
    candidates: tuple[CutCandidate, ...] = ()
    compared: Compared | None = None
    stability: Stability | None = None

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        kept = set(self.keep_blocks)
        return tuple(block for block in range(self.num_blocks) if block not in kept)

    @property
    def cut(self) -> tuple[int, int] | None:
        """(start, n) when the removed blocks are one run, else None."""
        removed = self.removed_blocks
        if not removed or any(b != a + 1 for a, b in pairwise(removed)):
            return None
        return removed[0], len(removed)


class Arm(_Part):
    """How a student was trained.

    `data` is "reference" or "distilled", for a merge its arms in words. `objective` is "" for the cross-entropy of the
    response. `num_rows` is the size of its training set, None for all rows.
    """

    data: str
    learning_rate: float | None = None
    objective: str = ""
    num_rows: int | None = None


class LossPoint(NamedTuple):
    """One training step: the objective per response token, in nats for plain fine-tuning."""

    step: int
    loss: float
    learning_rate: float


class Cost(_Part):
    """Medians of tokens/s (over all processes) and MFU (a fraction), and the largest peak of one process.

    None where it was not recorded.
    """

    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None


class Sample(_Part):
    """One row of the distilled set beside its reference."""

    example_id: str
    instruction: str
    reference: str
    distilled: str
    reason: str
    family: str = ""


class Decontamination(_Part):
    """Seed rows that share `ngram` consecutive words with a test question and were left out; 0: not checked.

    `num_rows` counts the rows before, `examples` are ids of the first rows left out.
    """

    ngram: int
    num_rows: int
    num_questions: int = 0
    num_contaminated: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gap(Shift):
    """Surprise of references and rewrites before training: `num_rows` of the `num_kept` kept rows were scored."""

    num_kept: int = 0
    verdict: str = ""


class Correction(_Part):
    """The teacher before (`teacher`) and after (`corrected`) its correction, on both texts of the same rows.

    `nll` is by model and text. `changes` is after less before by text, paired by row: negative where the teacher came
    nearer. `held_out`: the rows were kept out of its training.
    """

    data: str
    learning_rate: float
    num_steps: int
    num_rows: int
    held_out: bool = False
    nll: dict[str, dict[str, Estimate]] = {}
    changes: dict[str, Estimate] = {}
    verdict: str = ""


@dataclass(frozen=True)
class Forgetting(forgetting.Forgetting):
    """`held_out`: rows of the seed set were kept out of training. `verdicts` are by kind of text; `kl` is by model."""

    held_out: bool = False
    likeness: dict[str, forgetting.Likeness] = field(default_factory=dict)
    kl: dict[str, TeacherKl] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


class TrialRow(_Part):
    """One training of a grid: its loss on held-out rows in nats per token, or why it has none."""

    learning_rate: float
    seed: int
    held_out_loss: float | None = None
    reason: str = ""
    chosen: bool = False


class Grid(_Part):
    """The trials of an arm, rates and seeds ascending, compared on `num_tokens` response tokens of `num_rows` rows."""

    trials: tuple[TrialRow, ...]
    num_rows: int
    num_tokens: int


class Speed(_Part):
    """What was measured of both models, at the same batch sizes in the same order."""

    prompt_tokens: int
    new_tokens: int
    teacher: ModelSpeed
    pruned: ModelSpeed

    @property
    def batches(self) -> tuple[tuple[BatchSpeed, BatchSpeed], ...]:
        """Teacher and pruned model by batch size, ascending."""
        return tuple(zip(self.teacher.batches, self.pruned.batches, strict=True))


class Stage(_Part):
    """One step of the run. `skipped`: its artifact was reused; the figures are those of when it was made."""

    name: str
    address: str = ""
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    num_tokens: int = 0
    skipped: bool = False


class Gate(_Part):
    """A condition for a fair comparison: what it demands in words, its figures, and whether it holds."""

    name: str
    bound: str
    values: dict[str, float] = {}
    passed: bool


class BestVsNext(_Part):
    """By how much the mean score of the best arm exceeds that of the next best, paired by item."""

    best: str
    next_best: str
    difference: Interval


class Retention(_Part):
    """The retention cards of all students, and judgements where the recipe has release bounds (in words: `bounds`).

    `incomparable` are students that cannot be compared with teacher and pruned model, and why.
    """

    students: dict[str, Card] = {}
    incomparable: dict[str, str] = {}
    judgements: dict[str, Judgement] = {}
    bounds: tuple[str, ...] = ()
    lead: BestVsNext | None = None


class Truncation(_Part):
    """Task -> requests whose prompt lost its beginning. `context_tokens` limits prompt and answer together."""

    tasks: dict[str, int]
    context_tokens: int | None = None


class ReportData(_Part):
    """All that one page shows. Dictionaries are shown in their order.

    `created` is UTC, ISO 8601. `plan` is the last pruning's, its blocks counted in the model it starts from; `earlier`
    are those before it. `scores` are by model (teacher, pruned, then arms) and task, `recovery` by model (pruned too).
    `not_averaged` has the reason by task, `scales` metric and scale of tasks where lm-eval's is not 1;
    `grids` by arm that was trained several times, `selection` counts rows by reason.
    """

    name: str
    created: str = ""
    description: str = ""
    recipe_yaml: str = ""
    teacher_model: str = ""
    arms: dict[str, Arm] = {}
    sizes: Sizes | None = None
    distances: Distances | None = None
    plan: Plan | None = None
    earlier: tuple[Plan, ...] = ()
    scores: dict[str, dict[str, Estimate]] = {}
    not_averaged: dict[str, str] = {}
    scales: dict[str, tuple[str, float]] = {}
    recovery: dict[str, Recovery] = {}
    retention: Retention = Retention()
    truncation: Truncation | None = None
    tuned_families: tuple[str, ...] = ()
    loss_curves: dict[str, tuple[LossPoint, ...]] = {}
    training_costs: dict[str, Cost] = {}
    training_notes: dict[str, tuple[str, ...]] = {}
    grids: dict[str, Grid] = {}
    correction: Correction | None = None
    forgetting: Forgetting | None = None
    rows_read: dict[str, tuple[str, ...]] = {}
    """Set -> sentences on how its rows were read and which were left out."""
    decontamination: Decontamination | None = None
    selection: dict[str, int] = {}
    samples: tuple[Sample, ...] = ()
    gap: Gap | None = None
    speed: Speed | None = None
    stages: tuple[Stage, ...] = ()
    versions: dict[str, str] = {}
    machine: str = ""
    engines: dict[str, tuple[EngineUse, ...]] = {}
    """What answered, by step of `generate` and `evaluate`."""
    gates: tuple[Gate, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def arm_names(self) -> tuple[str, ...]:
        """All models that were trained, in the order of the recipe."""
        named = dict.fromkeys((*self.arms, *self.scores, *self.recovery, *self.loss_curves, *self.grids))
        return tuple(name for name in named if name not in (TEACHER, PRUNED))

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks: tuned families first, then the others, each in the order given."""
        every = dict.fromkeys(task for scores in self.scores.values() for task in scores)
        every.update(dict.fromkeys(task for part in self.recovery.values() for task in part.tasks))
        return tuple(sorted(every, key=lambda task: task not in self.tuned_families))

    def to_json(self) -> str:
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        """The inverse of `to_json`. Raises `ValueError` for anything else."""
        return cls.model_validate_json(text)
