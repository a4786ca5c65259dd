"""Everything that the report shows, as plain values. Whatever is missing is left out of the page."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

from sdft_ray.report.run.kept_model import Retention, Truncation

TEACHER, PRUNED = "teacher", "pruned"
"""Names of the two models that every comparison stands on; all others are arms."""


class _Part(BaseModel):
    """Frozen and strict; NaN and infinities are refused, because no page can show them honestly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Size(_Part):
    """Counts of one model, as `models.size.ModelSize` defines them."""

    num_blocks: int
    num_parameters: int
    matmul_flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


class Sizes(_Part):
    """Before and after."""

    teacher: Size
    pruned: Size


class Distances(_Part):
    """What was measured, over L blocks.

    `angular_*[n - 1][l]`: angular distance in [0, 1] between the inputs of blocks l and l + n, n = 1..L-1,
    None (or absent) where l + n > L. `block_influence[l]`: 1 - mean cosine of a block's input and output.
    """

    angular_last: tuple[tuple[float | None, ...], ...]
    angular_mean: tuple[tuple[float | None, ...], ...]
    block_influence: tuple[float, ...]
    num_sequences: int | None = None
    num_tokens: int | None = None

    @model_validator(mode="after")
    def _same_model(self) -> Self:
        expected = len(self.block_influence) - 1
        if len(self.angular_last) != expected or len(self.angular_mean) != expected:
            raise ValueError("distances need one row for each n from 1 to the number of blocks less one")
        return self


class Plan(_Part):
    """The blocks that stay, 0-based, and how they were chosen."""

    num_blocks: int
    keep_blocks: tuple[int, ...]
    metric: str = ""
    position: str = ""
    """"last" or "mean" where the metric is the angular distance, else ""."""
    widths: dict[str, tuple[int, int]] = {}
    """Of every channel space that shrank, how many members stayed, and of how many."""
    residuals: tuple[tuple[int, float, float], ...] = ()
    """Of every patch: its block in the pruned model, and how far the stream behind the cut was and is from the
    source's, as shares of its square."""

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


class Score(_Part):
    """A share of right answers in [0, 1] on `n` items."""

    value: float
    stderr: float | None = None
    n: int | None = None


class Ratio(_Part):
    """Student / teacher with its standard error; None where the teacher scores nothing."""

    value: float | None
    stderr: float | None = None


class Recovery(_Part):
    """How much of the teacher one model has: `mean` is mean score / mean score, `min` the worst ratio."""

    mean: Ratio
    min: float | None = None
    tasks: dict[str, Ratio] = {}
    tuned: Ratio | None = None
    """Over the tuned families alone."""
    off_domain: Ratio | None = None
    """Over all other families alone."""


class Arm(_Part):
    """What a student was made of."""

    data: str
    """"reference" or "distilled"; for a merge, its arms in words."""
    learning_rate: float | None = None
    objective: str = ""
    """In words, unless it is the cross-entropy of the response."""
    num_rows: int | None = None
    """Rows of the set that it was trained on; None: all."""


class LossPoint(NamedTuple):
    """One training step: the objective per response token, in nats for plain fine-tuning."""

    step: int
    loss: float
    learning_rate: float


class Cost(_Part):
    """What the steps of an arm's training cost: medians of tokens/s and MFU, and the largest peak of one process.

    None where it was not recorded. `mfu` is a fraction, `tokens_per_s` over all processes.
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
    """Seed rows that share `ngram` words in a row with a test question, and so were left out; 0: nobody looked."""

    ngram: int
    num_rows: int
    """Rows before any was left out."""
    num_questions: int = 0
    num_contaminated: int = 0
    examples: tuple[str, ...] = ()
    """Ids of the first rows left out."""


class Nats(_Part):
    """A mean over response tokens, in nats per token, with its standard error over rows."""

    value: float
    stderr: float | None = None


class TextNats(_Part):
    """The two texts of the same rows under one model."""

    reference: Nats
    distilled: Nats


class Gap(_Part):
    """How surprising references and rewrites are, before training; by model, empty where no rewrite was kept.

    `gaps` is reference less distilled, paired by row; `num_rows` of the `num_kept` kept rows were scored.
    """

    num_kept: int
    num_rows: int
    nll: dict[str, TextNats] = {}
    gaps: dict[str, Nats] = {}
    verdict: str = ""


class Correction(_Part):
    """The teacher before (`teacher`) and after (`corrected`) its correction, on both texts of the same rows.

    `changes` is after less before by text, paired by row: below 0 where the teacher came nearer. `held_out`: the rows
    were kept out of its training.
    """

    data: str
    """"reference" or "distilled": what it was tuned on."""
    learning_rate: float
    num_steps: int
    num_rows: int
    held_out: bool = False
    nll: dict[str, TextNats] = {}
    changes: dict[str, Nats] = {}
    verdict: str = ""


class Likeness(_Part):
    """How alike a model's answers are to the teacher's: cosines of sentence embeddings, in [-1, 1].

    `low` is the value that 5 % of the answers do not exceed. `mean` and `low` are None without answers.
    """

    num_answers: int
    mean: Ratio
    low: float | None = None
    num_empty: int = 0
    num_cut: int = 0


class Forgetting(_Part):
    """What models have lost, by model and then kind of text: `text` (held out), `reference`, `distilled`.

    `to_teacher` and `to_pruned` are by how much the mean exceeds that model's, paired by row; `perplexity_ratio` is
    over the teacher's, on held-out text. `held_out`: rows of the seed set were kept out of training. `verdicts` are
    by kind of text.
    """

    held_out: bool = False
    num_rows: dict[str, int] = {}
    nll: dict[str, dict[str, Nats]] = {}
    to_teacher: dict[str, dict[str, Nats]] = {}
    to_pruned: dict[str, dict[str, Nats]] = {}
    perplexity_ratio: dict[str, Ratio] = {}
    likeness: dict[str, Likeness] = {}
    verdicts: dict[str, str] = {}


class TrialRow(_Part):
    """One training of a grid: its loss on held-out rows in nats per token, or why it has none."""

    learning_rate: float
    seed: int
    held_out_loss: float | None = None
    reason: str = ""
    chosen: bool = False


class Grid(_Part):
    """The trials of an arm, rates and seeds ascending, and what they were compared on."""

    trials: tuple[TrialRow, ...]
    num_rows: int
    num_tokens: int
    """Response tokens of those rows."""


class Spread(_Part):
    """Over rounds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


class Compared(_Part):
    """One figure of both models. `speedup` is how many times as fast the pruned one is, taken round by round."""

    teacher: Spread
    pruned: Spread
    speedup: Spread


class BatchSpeed(_Part):
    """Both models with so many sequences at once, as `evaluation.speed.BatchSpeed` defines the figures.

    `prefill` and `decode` in tokens per second, `first_token` in seconds; bytes of teacher and pruned model.
    """

    batch_rows: int
    prefill: Compared
    decode: Compared
    first_token: Compared
    kv_bytes: tuple[int, int]
    peak_bytes: tuple[int, int] | None = None
    """None where it cannot be told."""


class Speed(_Part):
    """What was measured, batch sizes ascending; `weight_bytes` of teacher and pruned model."""

    prompt_tokens: int
    new_tokens: int
    weight_bytes: tuple[int, int]
    batches: tuple[BatchSpeed, ...]


class Stage(_Part):
    """One step of the run. `skipped`: its artifact was there already; the figures are those of its making."""

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


class ReportData(_Part):
    """All that one page shows. Dictionaries keep the order in which things are shown."""

    name: str
    created: str = ""
    """UTC, ISO 8601."""
    description: str = ""
    recipe_yaml: str = ""
    teacher_model: str = ""
    """Hub name or directory of the teacher."""
    arms: dict[str, Arm] = {}
    sizes: Sizes | None = None
    distances: Distances | None = None
    plan: Plan | None = None
    """The last pruning's; blocks are counted in the model that it starts from."""
    earlier: tuple[Plan, ...] = ()
    """Those of the steps before it."""
    scores: dict[str, dict[str, Score]] = {}
    """Model (teacher, pruned, then arms) -> task -> score."""
    recovery: dict[str, Recovery] = {}
    """Model (pruned too, if known) -> recovery."""
    retention: Retention = Retention()
    truncation: Truncation | None = None
    tuned_families: tuple[str, ...] = ()
    loss_curves: dict[str, tuple[LossPoint, ...]] = {}
    training_costs: dict[str, Cost] = {}
    training_notes: dict[str, tuple[str, ...]] = {}
    """What else should be known of an arm's training: rows left out or cut, damaged checkpoints, lost trackers."""
    grids: dict[str, Grid] = {}
    """Arms that were trained several times -> how their student was chosen."""
    correction: Correction | None = None
    forgetting: Forgetting | None = None
    decontamination: Decontamination | None = None
    selection: dict[str, int] = {}
    """Reason -> number of rows."""
    samples: tuple[Sample, ...] = ()
    gap: Gap | None = None
    speed: Speed | None = None
    stages: tuple[Stage, ...] = ()
    versions: dict[str, str] = {}
    machine: str = ""
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
