"""The recipe: the identity of one compression. Strict, frozen, YAML in and out.

A recipe says *what* is made; `sdft_ray.resources.Resources` says how it is executed. Two recipes with equal
content name the same artifacts, whatever file, machine or order of keys they come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic.functional_validators import AfterValidator, WrapValidator

from sdft_ray.errors import RecipeError
from sdft_ray.yaml_model import as_frozen, describe_validation_error, dump_yaml, read_yaml

AnswerKind = Literal["number", "choice", "text", "list", "json", "function_call", "code", "callable", "none"]
"""How a response is checked (see `sdft_ray.generation.checks`); `none` means that it is not."""

MAX_TOP_LOGPROBS = 128
"""Most log-probabilities per token that are kept."""


def _relative_to_recipe(value: str, info: ValidationInfo) -> str:
    """Make a path absolute against the recipe's folder when something lies there; leave names alone."""
    base: Path | None = (info.context or {}).get("base")
    if base is None or "://" in value or Path(value).is_absolute():
        return value
    candidate = (base / value).resolve()
    looks_like_path = value.startswith(".") or Path(value).suffix in {".jsonl", ".parquet", ".json", ".txt"}
    return str(candidate) if looks_like_path or candidate.exists() else value


Place = Annotated[str, AfterValidator(_relative_to_recipe)]
"""A file, directory or URL, or the name of something on a hub. Relative paths start at the recipe's folder.

Identity is the digest of what lies there, never the path: `sdft_ray.sources.Sources` replaces one by the other."""


def _one_or_several(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One number, or several different ones; a list of one is that one. Faults are told in one sentence."""
    try:
        found = check(value)
    except ValidationError as error:  # one entry per kind of value that it could have been
        raise ValueError(error.errors()[-1 if isinstance(value, tuple) else 0]["msg"]) from None
    if not isinstance(found, tuple):
        return found
    if len(set(found)) < max(1, len(found)):
        raise ValueError("give one number, or a list of different ones")
    return found[0] if len(found) == 1 else found


Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""
Rates = Annotated[Rate | tuple[Rate, ...], WrapValidator(_one_or_several)]
Seeds = Annotated[int | tuple[int, ...], WrapValidator(_one_or_several)]
"""In YAML a number, or a list to try side by side."""


class _Part(BaseModel):
    """Base of every part: no unknown fields, no coercion, no change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Teacher(_Part):
    """The unpruned model. A hub name is pinned to the commit `revision`; a directory to its files' digest."""

    model: Place
    revision: str | None = None
    config: Place | None = None
    """A copy of the model's config.json, so that a recipe can be sized where the hub is out of reach."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    trust_remote_code: bool = False


class RowSource(_Part):
    """Rows from JSONL or Parquet, or a named data set (`gsm8k`, `dolly`, `alpaca_cleaned`), train split."""

    source: Place
    revision: str | None = None
    """Commit of a named set; None takes the newest and records it."""
    columns: dict[str, str] = {}
    """Our column (`id`, `instruction`, `reference`, `answer_kind`, `check`, `family`) to theirs."""
    answer_kind: AnswerKind = "none"
    """Used for rows that do not carry their own."""
    check: str = ""
    """Likewise: a JSON schema, Python tests, or `module:function`, as the answer kind wants."""
    limit: int | None = Field(default=None, ge=1)


class Decontaminate(_Part):
    """Leave out seed rows that share `ngram` words in a row with a question of the evaluation tasks; 0 keeps all.

    13 is GPT-3's choice (arXiv:2005.14165, appendix C). For shorter questions see `sdft_ray.data.decontamination`.
    """

    ngram: int = Field(default=13, ge=0)


class SeedSet(RowSource):
    """Rows to rewrite and to train on."""

    decontaminate: Decontaminate = Decontaminate()


class Calibration(RowSource):
    """Rows used only to measure; each is cut to `max_tokens`."""

    max_tokens: int = Field(default=2048, ge=2)


class Depth(_Part):
    """Which decoder blocks to remove, and how many. Name the size in exactly one of three ways.

    `remove_blocks`: a number of blocks, at least 1. `keep_parameters`: a fraction in (0, 1) of the teacher's
    parameters to keep at most. `max_parameters`: a parameter count to stay at or under. With
    `metric: explicit`, `blocks` lists the removed blocks (0-based) and no size is given.
    """

    metric: Literal["angular_distance", "block_influence", "tail", "first", "random", "explicit"] = "angular_distance"
    position: Literal["last", "mean"] = "last"
    """Angular distance at the last token (arXiv:2403.17887), or its mean over tokens (steadier on few rows)."""
    remove_blocks: int | None = Field(default=None, ge=1)
    keep_parameters: float | None = Field(default=None, gt=0, lt=1)
    max_parameters: int | None = Field(default=None, ge=1)
    blocks: tuple[int, ...] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        sizes = [self.remove_blocks, self.keep_parameters, self.max_parameters]
        given = sum(size is not None for size in sizes)
        if self.metric == "explicit":
            if self.blocks is None or given:
                raise ValueError("metric explicit takes `blocks`, the blocks to remove, and no size")
        elif self.blocks is not None:
            raise ValueError("`blocks` goes with metric: explicit only")
        elif given != 1:
            raise ValueError("give exactly one of remove_blocks, keep_parameters, max_parameters")
        return self


class Generate(_Part):
    """How the teacher rewrites the seed set in its own words (arXiv:2410.09982, section 3)."""

    template: str = "own_words"
    """Name of a shipped template, or the text of one with `{instruction}` and `{reference}`."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    seed: int = 0
    num_samples: int = Field(default=1, ge=1)
    """Samples asked for at most per prompt; the first that passes selection ends the asking."""
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    """Likeliest tokens kept per response token, with log-probabilities and the tail's mass; 0 keeps none.

    These and hidden states are conditioned on the rewriting prompt, so on the reference: see `data/signals.py`.
    Both are counted in bytes by `sdft explain`."""
    hidden_states: bool = False
    """Keep what the output head takes in, bfloat16: exact full-vocabulary distillation for depth-pruned students."""
    attempt: int = Field(default=1, ge=1)
    """Raised by `sdft retry`: rows that failed are asked again, all others are taken over."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")
        return self


class Gap(_Part):
    """How far reference and rewrite lie from the teacher, measured before training."""

    num_rows: int = Field(default=512, ge=1)
    """Rows whose rewrite was kept that are scored at most, spread evenly over the set."""


class Lora(_Part):
    """Low-rank adapters (arXiv:2106.09685) on every linear map of a block; folded into the weights at the end."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Objective(_Part):
    """What training minimises over response tokens: a sum of terms, each times its weight; weight 0 leaves one out.

    The teacher, in the same process, reads what the student reads. `forward_kl: 1, cross_entropy: 0` is the logit
    distillation of Minitron (arXiv:2407.14679). With cached signals no teacher runs: training reads what generation
    kept, which is conditioned on the rewriting prompt, so on the reference (context distillation, not Minitron's: see
    `data/signals.py`). Rows that trained on their reference have no signals: they add cross-entropy alone, and are
    left out where that has weight 0. An objective reads the teacher in one of the two ways, not in both.
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
    """From teacher to student over the tokens that `generate.top_logprobs` kept and one tail for all others: at most
    the forward KL, equal to it when every token is kept. Always cached."""
    hidden_cosine: float = Field(default=0.0, ge=0)
    """1 - cosine between what the student's blocks put out and what the teacher's did there, mean over blocks."""
    hidden_mse: float = Field(default=0.0, ge=0)
    """Likewise, the mean squared difference per channel."""
    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions in all divergences, which are multiplied by its square (arXiv:1503.02531)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share in the mixture of the Jensen-Shannon divergence."""
    signals: Literal["online", "cached"] = "online"
    """Where whole distributions of the teacher come from: a teacher beside the student, or `generate.hidden_states`
    through the teacher's output head."""

    @property
    def divergences(self) -> tuple[str, ...]:
        """Terms that compare distributions, weight above 0."""
        names = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl")
        return tuple(name for name in names if getattr(self, name))

    @property
    def cached(self) -> dict[str, str]:
        """Terms computed from what generation kept, each with the field of `Generate` that keeps it."""
        products = {name: "hidden_states" for name in self.divergences if self.signals == "cached"}
        return products | ({"top_k_kl": "top_logprobs"} if self.top_k_kl else {})

    @property
    def matches(self) -> tuple[str, ...]:
        """Terms that compare hidden states, weight above 0."""
        return tuple(name for name in ("hidden_cosine", "hidden_mse") if getattr(self, name))

    @property
    def terms(self) -> tuple[str, ...]:
        """All terms with weight above 0."""
        told = ("cross_entropy",) if self.cross_entropy else ()
        return (*told, *self.divergences, *self.matches)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return bool(self._asked)

    @property
    def _asked(self) -> list[str]:
        return [name for name in (*self.divergences, *self.matches) if name not in self.cached]

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not self.terms:
            raise ValueError("an objective needs a term with a weight above 0, such as cross_entropy: 1")
        return self

    @model_validator(mode="after")
    def _one_way_to_the_teacher(self) -> Self:
        if self.signals == "cached" and "hidden_states" not in self.cached.values():
            raise ValueError("signals: cached is for forward_kl, reverse_kl and jensen_shannon; none has a weight")
        if self.cached and self._asked:
            told = f"{next(iter(self.cached))} reads cached signals and {self._asked[0]} needs the teacher online"
            raise ValueError(f"{told}; leave one out" + ("" if self.matches else ", or set signals: cached"))
        if self.top_k_kl and self.temperature != 1:
            raise ValueError("top_k_kl is for temperature 1: the mass of the tail at another is not known")
        return self


class Arm(_Part):
    """One way to recover. `reference` is plain supervised fine-tuning, `distilled` is self-data."""

    data: Literal["reference", "distilled"]
    learning_rate: Rates
    """A list makes a grid with `seed`: all are trained, and `train.held_out` decides which one is the student."""
    seed: Seeds = 0
    objective: Objective = Objective()

    @property
    def trials(self) -> dict[str, Trial]:
        """RATE, or RATE#SEED with several seeds -> that one training, in ascending order."""
        rates = self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        return {
            f"{rate!r}#{seed}" if len(seeds) > 1 else f"{rate!r}": Trial(
                data=self.data, learning_rate=rate, seed=seed, objective=self.objective
            )
            for rate in sorted(rates)
            for seed in sorted(seeds)
        }


class Trial(_Part):
    """One training of an arm."""

    data: Literal["reference", "distilled"]
    learning_rate: Rate
    seed: int = 0
    objective: Objective = Objective()

    @model_validator(mode="after")
    def _signals_speak_of_rewrites(self) -> Self:
        if self.objective.cached and self.data != "distilled":
            raise ValueError(f"{next(iter(self.objective.cached))} from cached signals needs data: distilled")
        return self


class Train(_Part):
    """Recovery training, shared by all arms. One of `num_steps` and `num_epochs`."""

    arms: dict[str, Arm] = Field(min_length=1)
    held_out: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the rows that no arm is trained on, drawn by their ids; arms with several trials choose by them."""
    lora: Lora | None = None
    """Adapters in place of weights."""
    tail_blocks: int | None = Field(default=None, ge=0)
    """Tune the output head, the final norm and so many of the last blocks alone; every weight with neither of both."""
    row_tokens: int = Field(default=2048, ge=8)
    """Length of a packed row; a document must fit."""
    long_rows: Literal["refuse", "drop", "cut_prompt"] = "refuse"
    """What becomes of a training row that does not fit: an error before anything starts, left out and counted, or the
    beginning of its instruction cut off, and counted. An answer is never cut."""
    rows_per_step: int = Field(default=32, ge=1)
    """Packed rows per optimizer step, over all workers."""
    tokens_per_step: int | None = Field(default=None, ge=8)
    """The same in tokens, padding included: as many whole rows as it holds. Give one of both."""
    num_steps: int | None = Field(default=None, ge=1)
    num_epochs: float | None = Field(default=None, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Make the running mean of the weights the student, such as 0.999 for thousands of steps."""

    @property
    def step_rows(self) -> int:
        """Packed rows of one optimizer step."""
        return self.rows_per_step if self.tokens_per_step is None else self.tokens_per_step // self.row_tokens

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if self.tokens_per_step is not None:
            if self.rows_per_step != type(self).model_fields["rows_per_step"].default:
                raise ValueError("give one of rows_per_step, tokens_per_step")
            if self.tokens_per_step < self.row_tokens:
                raise ValueError(f"tokens_per_step holds no row: row_tokens is {self.row_tokens}")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps, num_epochs")
        if self.lora is not None and self.tail_blocks is not None:
            raise ValueError("give lora or tail_blocks, not both")
        bad = [name for name in self.arms if name in {"teacher", "pruned"} or not name.isidentifier()]
        if bad:
            raise ValueError(f"{bad[0]!r} cannot name an arm: use letters, digits and _, not teacher or pruned")
        grids = [name for name, arm in self.arms.items() if len(arm.trials) > 1]
        if grids and not self.held_out:
            raise ValueError(
                f"arm {grids[0]!r} has several trials and nothing to choose by: "
                "set train.held_out, the share of rows kept out of training, such as 0.1"
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


class TeacherCorrection(_Part):
    """Brief tuning of the unpruned teacher on the distillation data (arXiv:2408.11796, section 3).

    Arms with a teacher in their objective compare with the corrected one; self-data stays the original's own. What
    is not named here is as in `train`. One of `num_steps` and `num_epochs`.
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


class Merge(_Part):
    """One student out of two arms: a point on the way between their weights (arXiv:2410.09982)."""

    arms: tuple[str, str]
    kind: Literal["slerp", "linear"] = "slerp"
    t: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0.5,), min_length=1)
    """Shares of the second arm. One makes the student NAME, several make NAME_25, NAME_50, ... side by side."""

    def students(self, name: str) -> dict[str, float]:
        """Student -> its share."""
        if len(self.t) == 1:
            return {name: self.t[0]}
        return {f"{name}_{100 * t:.4g}".replace(".", "_"): t for t in self.t}


class Task(_Part):
    """One lm-eval task. `metric` None takes acc_norm, acc or exact_match, whichever the task has first."""

    name: str
    num_fewshot: int | None = Field(default=None, ge=0)
    metric: str | None = None


class Evaluate(_Part):
    """What teacher, pruned model and students are asked."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    include: Place | None = None
    """A folder of further lm-eval task files."""
    limit: int | None = Field(default=None, ge=1)
    apply_chat_template: bool = True
    tuned: tuple[str, ...] = ()
    """Tasks of the same kind as the fine-tuning set; all others count as off-domain."""
    seed: int = 0

    @model_validator(mode="after")
    def _tuned_are_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("a task is named twice")
        stray = sorted(set(self.tuned) - set(names))
        if stray:
            raise ValueError(f"tuned names {stray[0]!r}, which is not among tasks")
        return self


class Speed(_Part):
    """Measured tokens/s: `batch_rows` prompts of `prompt_tokens`, then `new_tokens` greedy tokens each."""

    batch_rows: int = Field(default=16, ge=1)
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    rounds: int = Field(default=5, ge=1)


class Recipe(_Part):
    """One compression, from teacher to evaluated students."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    description: str = ""
    replicate: int = Field(default=1, ge=1)
    """Raise it to run everything once more under new addresses."""
    teacher: Teacher
    seed_set: SeedSet
    calibration: Calibration
    depth: Depth
    generate: Generate = Generate()
    gap: Gap = Gap()
    train: Train
    teacher_correction: TeacherCorrection | None = None
    merges: dict[str, Merge] = {}
    """Students made of two arms, evaluated like the arms."""
    evaluate: Evaluate
    speed: Speed = Speed()
    gates: Place | None = None
    """A JSON file of conditions for a fair comparison and whether they hold, to be printed in the report."""

    @property
    def merged(self) -> dict[str, tuple[Merge, float]]:
        """Student -> the merge that makes it, and its share of the second arm."""
        return {
            student: (merge, t) for name, merge in self.merges.items() for student, t in merge.students(name).items()
        }

    @property
    def correction(self) -> Train | None:
        """The teacher's own training, as one with the single arm `teacher`."""
        asked = self.teacher_correction
        if asked is None:
            return None
        arm = Arm(data=asked.data, learning_rate=asked.learning_rate, seed=asked.seed)
        own = {name: getattr(asked, name) for name in ("num_steps", "num_epochs", "lora")}
        return self.train.model_copy(update={**own, "tail_blocks": None, "arms": {"teacher": arm}})

    @model_validator(mode="after")
    def _correction_is_used(self) -> Self:
        if self.teacher_correction and not any(arm.objective.needs_teacher for arm in self.train.arms.values()):
            raise ValueError(
                "teacher_correction has no use: no arm compares with a teacher; "
                "give one an objective such as {forward_kl: 1}, or leave the correction out"
            )
        return self

    @model_validator(mode="after")
    def _cached_signals_are_generated(self) -> Self:
        for name, arm in self.train.arms.items():
            for term, product in arm.objective.cached.items():
                if not getattr(self.generate, product):
                    raise ValueError(f"train.arms.{name}: {term} needs generate.{product}, which is off")
        return self

    @model_validator(mode="after")
    def _merges_have_arms(self) -> Self:
        names = [student for name, merge in self.merges.items() for student in merge.students(name)]
        taken = {"teacher", "pruned", *self.train.arms}
        for name in names:
            if name in taken or not name.isidentifier() or names.count(name) > 1:
                raise ValueError(f"{name!r} cannot name a merge: use letters, digits and _, and no name twice")
        for merge in self.merges.values():
            stray = [arm for arm in merge.arms if arm not in self.train.arms]
            if stray or merge.arms[0] == merge.arms[1]:
                raise ValueError(f"a merge takes two different arms of train.arms, not {' and '.join(merge.arms)}")
        return self

    @classmethod
    def parse(cls, data: Any, *, base: Path | None = None, origin: str = "recipe") -> Recipe:
        """Validate plain data. Raises `RecipeError` that names the field and, if near, the one meant."""
        try:
            return cls.model_validate(as_frozen(data), context={"base": base})
        except ValidationError as error:
            raise RecipeError(*describe_validation_error(error, cls, origin)) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file; relative paths inside it start at its folder. Raises `RecipeError`."""
        path = Path(path)
        return cls.parse(read_yaml(path, RecipeError), base=path.resolve().parent, origin=str(path))

    def to_yaml(self) -> str:
        """The recipe without fields that equal their default."""
        return dump_yaml(self.model_dump(mode="json", exclude_defaults=True))
