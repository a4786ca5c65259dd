"""Parts of the recipe that say how a pruned model is trained again, and how students are merged."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.functional_validators import WrapValidator

from sdft_ray.recipe.yaml_model import StrictPart, one_or_several, renamed_value

LongExamples = Annotated[
    Literal["refuse", "drop", "truncate_prompt"], *renamed_value({"cut_prompt": "truncate_prompt"})
]
Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""
Rates = Annotated[Rate | tuple[Rate, ...], WrapValidator(one_or_several)]
Seeds = Annotated[int | tuple[int, ...], WrapValidator(one_or_several)]
"""In YAML a number, or a list to try side by side."""
NumRows = Annotated[int | None, Field(ge=1)]
"""Train on only this many rows of the set, chosen by their ids and the same for every arm: a larger selection contains
the smaller ones. None: all rows."""


class Lora(StrictPart):
    """Low-rank adapters (arXiv:2106.09685) on every linear layer of a block; merged into the weights at the end."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Objective(StrictPart):
    """What training minimises over response tokens: a sum of terms, each times its weight; weight 0 leaves one out.

    The teacher, in the same process, reads what the student reads. `forward_kl: 1, cross_entropy: 0` is the logit
    distillation of Minitron (arXiv:2407.14679). With `teacher_logits: cached` no teacher runs: training reads the
    signals that generation stored. They are conditioned on the rewriting prompt, so on the reference (context
    distillation, not Minitron's: see `data/signals.py`). Rows that trained on their reference have no signals: they
    add cross-entropy alone, and are left out where that has weight 0. An objective reads the teacher in one of the two
    ways, not in both.
    """

    cross_entropy: float = Field(default=1.0, ge=0)
    """Of the response itself."""
    forward_kl: float = Field(default=0.0, ge=0)
    """From teacher to student: cover what the teacher may say."""
    reverse_kl: float = Field(default=0.0, ge=0)
    """From student to teacher: say nothing that the teacher would not."""
    jensen_shannon: float = Field(default=0.0, ge=0)
    """Generalised, between the two: see `beta` (arXiv:2306.13649)."""
    top_k_kl: float = Field(default=0.0, ge=0)
    """From teacher to student over the tokens that `generate.top_logprobs` stored and one entry for all others: at most
    the forward KL, equal to it when every token is stored. Always cached."""
    hidden_cosine: float = Field(default=0.0, ge=0)
    """1 - cosine similarity of the outputs of the student's blocks and of the same blocks of the teacher; mean over
    blocks."""
    hidden_mse: float = Field(default=0.0, ge=0)
    """Mean squared difference of the same outputs, per channel."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions in all divergences, which are multiplied by its square (arXiv:1503.02531)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share in the mixture of the Jensen-Shannon divergence."""
    teacher_logits: Literal["online", "cached"] = Field(default="online", serialization_alias="signals")
    """Where whole distributions of the teacher come from: a teacher beside the student, or `generate.hidden_states`
    through the teacher's LM head."""

    @property
    def divergences(self) -> tuple[str, ...]:
        """Terms that compare distributions, weight above 0."""
        names = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl")
        return tuple(name for name in names if getattr(self, name))

    @property
    def cached(self) -> dict[str, str]:
        """Terms computed from what generation kept, each with the field of `Generate` that keeps it."""
        products = {name: "hidden_states" for name in self.divergences if self.teacher_logits == "cached"}
        return products | ({"top_k_kl": "top_logprobs"} if self.top_k_kl else {})

    @property
    def matches(self) -> tuple[str, ...]:
        """Terms that compare hidden states, weight above 0."""
        return tuple(name for name in ("hidden_cosine", "hidden_mse") if getattr(self, name))

    @property
    def terms(self) -> tuple[str, ...]:
        """All terms with weight above 0."""
        own = ("cross_entropy",) if self.cross_entropy else ()
        return (*own, *self.divergences, *self.matches)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each of `terms`."""
        return {name: getattr(self, name) for name in self.terms}

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return bool(self._online)

    @property
    def _online(self) -> list[str]:
        return [name for name in (*self.divergences, *self.matches) if name not in self.cached]

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not self.terms:
            raise ValueError("an objective needs a term with a weight above 0, such as cross_entropy: 1")
        return self

    @model_validator(mode="after")
    def _one_way_to_the_teacher(self) -> Self:
        if self.teacher_logits == "cached" and "hidden_states" not in self.cached.values():
            raise ValueError(
                "teacher_logits: cached needs a weight above 0 for forward_kl, reverse_kl or jensen_shannon"
            )
        if self.cached and self._online:
            both = f"{next(iter(self.cached))} reads cached signals and {self._online[0]} needs the teacher online"
            raise ValueError(f"{both}; remove one" + ("" if self.matches else ", or set teacher_logits: cached"))
        if self.top_k_kl and self.temperature != 1:
            raise ValueError("top_k_kl needs temperature: 1, that of the stored log-probabilities")
        return self


class Arm(StrictPart):
    """One way to recover. `reference`: fine-tuning on the references; `distilled`: on the teacher's rewrites."""

    data: Literal["reference", "distilled"]
    learning_rate: Rates
    """A list makes a grid with `seed`: all are trained, and the rows that `train.validation_fraction` holds out decide
    which one is the student."""
    seed: Seeds = 0
    objective: Objective = Objective()
    num_rows: NumRows = None

    @property
    def trials(self) -> dict[str, Trial]:
        """RATE, or RATE#SEED with several seeds -> that one training, in ascending order."""
        rates = self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        return {
            f"{rate!r}#{seed}" if len(seeds) > 1 else f"{rate!r}": Trial(
                data=self.data, learning_rate=rate, seed=seed, objective=self.objective, num_rows=self.num_rows
            )
            for rate in sorted(rates)
            for seed in sorted(seeds)
        }

    @model_validator(mode="after")
    def _signals_speak_of_rewrites(self) -> Self:
        if self.objective.cached and self.data != "distilled":
            raise ValueError(f"{next(iter(self.objective.cached))} from cached signals needs data: distilled")
        return self


class Trial(StrictPart):
    """One training of an arm."""

    data: Literal["reference", "distilled"]
    learning_rate: Rate
    seed: int = 0
    objective: Objective = Objective()
    num_rows: NumRows = None


class Train(StrictPart):
    """Recovery training, shared by all arms. One of `num_steps` and `num_epochs`."""

    arms: dict[str, Arm] = Field(min_length=1)
    validation_fraction: float = Field(default=0.0, ge=0, le=0.5, serialization_alias="held_out")
    """Share of the rows that no arm is trained on, drawn by their ids; arms with several trials choose by them."""
    lora: Lora | None = None
    """Train LoRA adapters instead of the weights."""
    train_last_n_layers: int | None = Field(default=None, ge=0, serialization_alias="tail_blocks")
    """Train only the LM head, the final norm and this many of the last decoder blocks; with neither this nor
    `lora`, all weights are trained."""
    turns: Literal["last", "all"] = "last"
    """Which answers of a conversation in the seed set are trained on: its last message, or each answer of the
    assistant as a row of its own, whose prompt is all that comes before it."""
    max_seq_len: int = Field(default=2048, ge=8, serialization_alias="row_tokens")
    """Tokens of a packed row; an example must fit."""
    long_examples: LongExamples = Field(default="refuse", serialization_alias="long_rows")
    """What is done with a training example that does not fit: `refuse` is an error before anything starts, `drop`
    leaves it out, and `truncate_prompt` leaves out its oldest turns, then the beginning of its instruction. Both are
    counted. A response is never cut."""
    global_batch_size: int = Field(default=32, ge=1, serialization_alias="rows_per_step")
    """Packed rows per optimizer step, over all workers."""
    tokens_per_step: int | None = Field(default=None, ge=8)
    """The same in tokens, padding included: as many whole rows as it holds. Give only one of the two."""
    num_steps: int | None = Field(default=None, ge=1)
    num_epochs: float | None = Field(default=None, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0, serialization_alias="clip_norm")
    """Gradients are scaled down to this global L2 norm."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights that becomes the student, such as 0.999 for thousands of
    steps."""

    @property
    def step_rows(self) -> int:
        """Packed rows of one optimizer step."""
        return self.global_batch_size if self.tokens_per_step is None else self.tokens_per_step // self.max_seq_len

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if self.tokens_per_step is not None:
            if self.global_batch_size != type(self).model_fields["global_batch_size"].default:
                raise ValueError("give only one of global_batch_size, tokens_per_step")
            if self.tokens_per_step < self.max_seq_len:
                raise ValueError(f"tokens_per_step is smaller than one row: max_seq_len is {self.max_seq_len}")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps, num_epochs")
        if self.lora is not None and self.train_last_n_layers is not None:
            raise ValueError("give lora or train_last_n_layers, not both")
        bad = [name for name in self.arms if name in {"teacher", "pruned"} or not name.isidentifier()]
        if bad:
            raise ValueError(f"{bad[0]!r} is not a valid arm name: use letters, digits and _, not teacher or pruned")
        grids = [name for name, arm in self.arms.items() if len(arm.trials) > 1]
        if grids and not self.validation_fraction:
            raise ValueError(
                f"arm {grids[0]!r} has several trials, but no validation rows to choose by: "
                "set train.validation_fraction, the share of rows kept out of training, such as 0.1"
            )
        return self

    def trials_of(self, arm: str) -> dict[str, Trial]:
        """Name -> a training of the arm: ARM where there is one, else ARM@RATE or ARM@RATE#SEED."""
        trials = self.arms[arm].trials
        return {arm if len(trials) == 1 else f"{arm}@{label}": trial for label, trial in trials.items()}

    @property
    def trials(self) -> dict[str, Trial]:
        """Those of all arms."""
        return {name: trial for arm in self.arms for name, trial in self.trials_of(arm).items()}


class TeacherCorrection(StrictPart):
    """Brief tuning of the unpruned teacher on the distillation data (arXiv:2408.11796, section 3).

    Arms with a teacher in their objective compare with the corrected one; rewrites are still those of the original
    teacher. Fields that are missing here are as in `train`. One of `num_steps` and `num_epochs`.
    """

    data: Literal["reference", "distilled"]
    learning_rate: Rate
    num_steps: int | None = Field(default=None, ge=1)
    num_epochs: float | None = Field(default=None, gt=0)
    seed: int = 0
    lora: Lora | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps, num_epochs")
        return self


class Merge(StrictPart):
    """A student with weights interpolated between those of two arms (arXiv:2410.09982)."""

    arms: tuple[str, str]
    kind: Literal["slerp", "linear"] = "slerp"
    t: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0.5,), min_length=1)
    """Shares of the second arm. One makes the student NAME, several make NAME_25, NAME_50, ... side by side."""

    def students(self, name: str) -> dict[str, float]:
        """Student -> its share."""
        if len(self.t) == 1:
            return {name: self.t[0]}
        return {f"{name}_{100 * t:.4g}".replace(".", "_"): t for t in self.t}
