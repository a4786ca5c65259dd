"""The recipe: the identity of one compression. Strict, frozen, YAML in and out.

A recipe says *what* is made; `sdft_ray.resources.Resources` says how it is executed. Two recipes with equal
content name the same artifacts, whatever file, machine or order of keys they come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from pydantic.functional_validators import AfterValidator

from sdft_ray.errors import RecipeError
from sdft_ray.recipe_arms import Arm, Merge, TeacherCorrection, Train
from sdft_ray.yaml_model import StrictPart, as_frozen, describe_validation_error, dump_yaml, read_yaml

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


class Teacher(StrictPart):
    """The unpruned model. A hub name is pinned to the commit `revision`; a directory to its files' digest."""

    model: Place
    revision: str | None = None
    config: Place | None = None
    """A copy of the model's config.json, so that a recipe can be sized where the hub is out of reach."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    trust_remote_code: bool = False


class RowSource(StrictPart):
    """Rows from JSONL or Parquet, or a named data set (`gsm8k`, `dolly`, `alpaca_cleaned`), train split."""

    source: Place
    revision: str | None = None
    """Commit of a named set; None takes the newest and records it."""
    columns: dict[str, str] = Field(default={})
    """Our column (`id`, `instruction`, `reference`, `answer_kind`, `check`, `family`) to theirs."""
    answer_kind: AnswerKind = "none"
    """Used for rows that do not carry their own."""
    check: str = ""
    """Likewise: a JSON schema, Python tests, or `module:function`, as the answer kind wants."""
    limit: int | None = Field(default=None, ge=1)


class Decontaminate(StrictPart):
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


class Depth(StrictPart):
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


Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Width(StrictPart):
    """What to keep of each channel space, as a share in (0, 1) or a count; a space that is not named stays whole.

    `hidden`: channels of the residual stream, one choice for the whole model. `mlp`: channels between the MLP's
    projections. `heads`: query heads, equally many in each key-value group. `kv_groups`: key-value heads, with their
    query heads. The most active stay (arXiv:2407.14679): |activation| by `over_tokens`, then by `over_sequences`.
    """

    hidden: Count | Share | None = None
    mlp: Count | Share | None = None
    heads: Count | Share | None = None
    kv_groups: Count | Share | None = None
    multiple_of: int = Field(default=1, ge=1)
    """Shares of `hidden` and `mlp` are rounded down to it; counts must be such. GPUs like 64 or 128."""
    over_tokens: Literal["mean", "l2"] = "mean"
    over_sequences: Literal["mean", "l2"] = "l2"

    @model_validator(mode="after")
    def _names_a_space(self) -> Self:
        if all(getattr(self, space) is None for space in ("hidden", "mlp", "heads", "kv_groups")):
            raise ValueError("name a space to prune: hidden, mlp, heads or kv_groups")
        return self


class Generate(StrictPart):
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


class Gap(StrictPart):
    """How far reference and rewrite lie from the teacher, measured before training."""

    num_rows: int = Field(default=512, ge=1)
    """Rows whose rewrite was kept that are scored at most, spread evenly over the set."""


class Task(StrictPart):
    """One lm-eval task. `metric` None takes acc_norm, acc or exact_match, whichever the task has first."""

    name: str
    num_fewshot: int | None = Field(default=None, ge=0)
    metric: str | None = None


class Evaluate(StrictPart):
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


class Speed(StrictPart):
    """Measured tokens/s: `batch_rows` prompts of `prompt_tokens`, then `new_tokens` greedy tokens each."""

    batch_rows: int = Field(default=16, ge=1)
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    rounds: int = Field(default=5, ge=1)


class Recipe(StrictPart):
    """One compression, from teacher to evaluated students."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    description: str = ""
    replicate: int = Field(default=1, ge=1)
    """Raise it to run everything once more under new addresses."""
    teacher: Teacher
    seed_set: SeedSet
    calibration: Calibration
    depth: Depth = Depth(metric="explicit", blocks=())
    """Without it every block stays."""
    width: Width | None = None
    generate: Generate = Generate()
    gap: Gap = Gap()
    train: Train
    teacher_correction: TeacherCorrection | None = None
    merges: dict[str, Merge] = Field(default={})
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
    def _matched_states_are_of_one_size(self) -> Self:
        matching = [name for name, arm in self.train.arms.items() if arm.objective.matches]
        if matching and self.width is not None and self.width.hidden is not None:
            raise ValueError(
                f"train.arms.{matching[0]} compares hidden states, and with width.hidden the student's are shorter "
                "than the teacher's; leave one of both out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_pruned(self) -> Self:
        if "depth" not in self.model_fields_set and self.width is None:
            raise ValueError("say what to prune: depth, width, or both")
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
