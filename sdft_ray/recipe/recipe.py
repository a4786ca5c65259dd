"""The recipe: the identity of one compression. Strict, frozen, YAML in and out.

A recipe says *what* is made; `sdft_ray.recipe.resources.Resources` says how it is executed. Two recipes with equal
content name the same artifacts, whatever file, machine or order of keys they come from.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, ValidationInfo, model_validator
from pydantic.functional_validators import AfterValidator, WrapValidator

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.arms import Arm, Merge, TeacherCorrection, Train
from sdft_ray.recipe.pruning import Pruning
from sdft_ray.recipe.suites import with_suite
from sdft_ray.recipe.yaml_model import (
    STORED,
    StrictPart,
    as_frozen,
    describe_validation_error,
    dump_yaml,
    one_or_several,
    read_yaml,
)

AnswerKind = Literal["number", "choice", "text", "list", "json", "function_call", "code", "callable", "none"]
"""How a response is checked (see `sdft_ray.generation.checks`); `none` means that it is not."""

MAX_TOP_LOGPROBS = 128
"""Maximum number of log-probabilities stored per token."""


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

Identity is the digest of what lies there, never the path: `stages.sources.Sources` replaces one by the other."""


class Teacher(StrictPart):
    """The unpruned model. A hub name is pinned to the commit `revision`; a directory to its files' digest."""

    model: Place
    revision: str | None = None
    config: Place | None = None
    """A copy of the model's config.json, so that `sdft explain` can compute sizes without the Hugging Face Hub."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _runs_no_custom_code(cls, data: Any, info: ValidationInfo) -> Any:
        """`trust_remote_code` was a field that nothing heeded; what an earlier version wrote may have it."""
        if not isinstance(data, dict) or "trust_remote_code" not in data:
            return data
        if data["trust_remote_code"] is not False and not (info.context or {}).get("stored"):
            raise ValueError("trust_remote_code is no longer a field: custom code is not run, and never was; remove it")
        return {name: value for name, value in data.items() if name != "trust_remote_code"}


def _as_date(value: Any) -> Any:
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Lists as JSON has them; see `as_frozen`."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _for_template(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    taken = sorted(_TEMPLATE_NAMES & value.keys())
    if taken:
        raise ValueError(f"{taken[0]} is set by the service; give only what this model's template asks for")
    return value


_TEMPLATE_NAMES = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "strftime_now", "raise_exception", "bos_token", "eos_token",
}  # fmt: skip
"""What the service or transformers gives to a chat template."""


class Chat(StrictPart):
    """How conversations are rendered by the teacher's chat template, wherever that happens. Part of identity."""

    system: str = ""
    """The text of a system turn, for rows that have none of their own."""
    template_arguments: Annotated[dict[str, JsonValue], BeforeValidator(_plain), AfterValidator(_for_template)] = Field(
        default={}
    )
    """Further arguments of the template, for example `enable_thinking: false`."""
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = datetime.date(2026, 1, 1)
    """The day that templates print which print one. It stays the same when a run goes on another day."""


class RowSource(StrictPart):
    """Rows from JSON Lines, JSON or Parquet, or a named data set (`gsm8k`, `dolly`, `alpaca_cleaned`), train split."""

    source: Place
    revision: str | None = None
    """Commit of a named set; None: the newest, which is recorded."""
    columns: dict[str, str] = Field(default={})
    """Our column (`id`, `instruction`, `context`, `reference`, `system`, `history`, `messages`, `answer_kind`, `check`,
    `family`) -> column of the source, or a place in it (`answers.text.0`); "" for none. Usual names need no mapping."""
    answer_kind: AnswerKind = "none"
    """For rows without a value of their own."""
    check: str = ""
    """Likewise: a JSON schema, Python tests, or `module:function`, as the answer kind requires."""
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
    """Rows used only to measure; each is truncated to `max_tokens`."""

    max_tokens: int = Field(default=2048, ge=2)


class Forgetting(RowSource):
    """Text that no model is trained on, to measure what each model has forgotten; same form as a calibration set."""

    num_rows: int = Field(default=256, ge=1)
    """Maximum number of rows to score, spread evenly over the source."""
    max_tokens: int = Field(default=1024, ge=2)
    """Each row is truncated to this many tokens."""
    embedding: Place | None = None
    """Directory or hub name of a sentence embedding model, to compare answers with those of the teacher."""
    embedding_revision: str | None = None
    """Commit of the embedding model on the hub; None: the newest."""


class Generate(StrictPart):
    """How the teacher rewrites the seed set in its own words (arXiv:2410.09982, section 3)."""

    template: str = "own_words"
    """Name of a shipped template, or the text of one with `{instruction}` and `{reference}`."""
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=1)
    seed: int = 0
    num_samples: int = Field(default=1, ge=1)
    """Maximum number of samples per prompt; no more are drawn after one that passes selection."""
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    """Most likely tokens to store per response token, with log-probabilities and the total of all others; 0: none.

    These and hidden states are conditioned on the rewriting prompt, so on the reference: see `data/signals.py`.
    Both are counted in bytes by `sdft explain`."""
    hidden_states: bool = False
    """Store the inputs of the LM head in bfloat16: exact full-vocabulary distillation for depth-pruned students."""
    attempt: int = Field(default=1, ge=1)
    """Raised by `sdft retry`: rows that failed are generated again, all others are reused."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")
        return self


class Gap(StrictPart):
    """How far references and rewrites are from the teacher's distribution, measured before training."""

    num_rows: int = Field(default=512, ge=1)
    """Maximum number of rows to score, among those with an accepted rewrite, spread evenly over the set."""


class Task(StrictPart):
    """One lm-eval task. `metric` None: the first of acc_norm, acc and exact_match that the task has."""

    name: str
    num_fewshot: int | None = Field(default=None, ge=0)
    metric: str | None = None


class Samples(StrictPart):
    """Several answers to each question of the generation tasks, for pass@k beside the greedy score."""

    num: int = Field(default=8, ge=2)
    temperature: float = Field(default=0.8, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)


_Items = Annotated[int, Field(ge=1)]


class Evaluate(StrictPart):
    """Tasks for teacher, pruned model and students. `suite: NAME` sets the fields as in `sdft_ray.recipe.suites`."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    include: Place | None = None
    """A folder of further lm-eval task files. All files that its tasks read count, wherever they lie."""
    data: Place | None = None
    """A folder that holds the data sets of the hub as files, in the form of `sdft_ray.evaluation.task_data`; all tasks
    then read their data there, and nothing is downloaded."""
    limit: _Items | dict[str, _Items] | None = None
    """Only the first items of each task, and of each member of a group: one number, or one by task for some tasks."""
    apply_chat_template: bool = True
    tuned: tuple[str, ...] = ()
    """Tasks of the same kind as the fine-tuning set; all others count as off-domain."""
    seed: int = 0
    samples: Samples | None = None

    @model_validator(mode="before")
    @classmethod
    def _suite(cls, data: Any) -> Any:
        return with_suite(data)

    @property
    def shots(self) -> dict[str, int | None]:
        """Few-shot examples by task; None: the task's own number."""
        return {task.name: task.num_fewshot for task in self.tasks}

    @model_validator(mode="after")
    def _names_are_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("a task is listed twice")
        stray = sorted(set(self.tuned) - set(names))
        if stray:
            raise ValueError(f"tuned lists {stray[0]!r}, which is not in tasks")
        stray = sorted(set(self.limit if isinstance(self.limit, dict) else ()) - set(names))
        if stray:
            raise ValueError(f"limit has a number for {stray[0]!r}, which is not in tasks")
        return self


def _ascending(value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    return tuple(sorted(value)) if isinstance(value, tuple) else value


_Rows = Annotated[int, Field(ge=1)]
BatchRows = Annotated[_Rows | tuple[_Rows, ...], WrapValidator(one_or_several), AfterValidator(_ascending)]
"""In YAML a number, or a list of numbers, which are measured one after another."""


class Release(StrictPart):
    """Bounds that a student must meet to be marked as releasable. Recovery is the score of the student divided by that
    of the teacher, for the mean over tasks or for one task."""

    min_recovery: float | None = Field(default=None, gt=0)
    min_task_recovery: float | None = Field(default=None, gt=0)
    no_task_below_pruned: bool = False
    """No task may be worse, beyond chance, than after pruning alone."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.min_recovery is None and self.min_task_recovery is None and not self.no_task_below_pruned:
            raise ValueError("give min_recovery, min_task_recovery or no_task_below_pruned, or leave release out")
        return self


class Speed(StrictPart):
    """Measured speed: `batch_rows` prompts of `prompt_tokens` at once, then `new_tokens` greedy tokens each.

    A target in speed is measured with the largest batch alone.
    """

    batch_rows: BatchRows = (1, 16)
    """By default one client, and a batch."""
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=64, ge=2)
    rounds: int = Field(default=5, ge=1)

    @property
    def batches(self) -> tuple[int, ...]:
        """All sizes, ascending."""
        return self.batch_rows if isinstance(self.batch_rows, tuple) else (self.batch_rows,)

    @property
    def largest_batch(self) -> int:
        return self.batches[-1]


_FIRST = ("name", "description", "replicate", "teacher", "chat", "seed_set", "calibration", "steps")
"""How a recipe begins on paper."""


class PruningStep(Pruning):
    """An earlier step of iterative compression: prune, recover with one arm, continue from there (arXiv:2407.14679)."""

    arm: Arm
    num_steps: int | None = Field(default=None, ge=1)
    num_epochs: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of num_steps, num_epochs")
        if len(self.arm.trials) > 1:
            raise ValueError("the arm of an earlier step takes one learning rate and one seed, not a list")
        return self


class Recipe(Pruning):
    """One compression, from teacher to evaluated students."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    description: str = ""
    replicate: int = Field(default=1, ge=1)
    """Raise it to run everything once more under new addresses."""
    teacher: Teacher
    seed_set: SeedSet
    calibration: Calibration
    chat: Chat = Chat()
    steps: tuple[PruningStep, ...] = ()
    """Earlier prunings, each with its recovery training, in order; the first starts from the teacher."""
    generate: Generate = Generate()
    gap: Gap = Gap()
    forgetting: Forgetting | None = None
    """Without it, forgetting is not measured."""
    train: Train
    teacher_correction: TeacherCorrection | None = None
    merges: dict[str, Merge] = Field(default={})
    """Students merged from two arms, evaluated like the arms."""
    evaluate: Evaluate
    speed: Speed = Speed()
    gates: Place | None = None
    """A JSON file of conditions for a fair comparison and whether they hold, to be printed in the report."""
    release: Release | None = None
    """Without it, students are not checked against bounds."""

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
        return self.train.model_copy(update={**own, "train_last_n_layers": None, "arms": {"teacher": arm}})

    @property
    def trains_on_rewrites(self) -> bool:
        """Whether the distilled set is trained on at all."""
        corrected = self.teacher_correction is not None and self.teacher_correction.data == "distilled"
        return corrected or any(arm.data == "distilled" for _, arm in self._arms())

    @property
    def prunings(self) -> dict[str, Recipe]:
        """What each pruning in turn is made by: `step1`, `step2`, ..., as recipes without steps, and "", itself."""
        earlier = {}
        for number, step in enumerate(self.steps, 1):
            part = {name: getattr(step, name) for name in Pruning.model_fields}
            length = {"num_steps": step.num_steps, "num_epochs": step.num_epochs}
            train = self.train.model_copy(update={**length, "arms": {f"step{number}": step.arm}})
            earlier[f"step{number}"] = self.model_copy(update={**part, "train": train, "steps": (), "merges": {}})
        return {**earlier, "": self}

    def for_pruning(self, about: str) -> Recipe:
        """The recipe of an earlier step where `about` names one (`step1`), else this one."""
        return self.prunings.get(about, self)

    @model_validator(mode="after")
    def _previous_is_another(self) -> Self:
        if self.distil_from == "previous" and not self.steps:
            raise ValueError("distil_from: previous needs `steps`; without them there is only the original model")
        return self

    @model_validator(mode="after")
    def _correction_is_used(self) -> Self:
        if self.teacher_correction and not any(arm.objective.needs_teacher for _, arm in self._arms()):
            raise ValueError(
                "teacher_correction has no effect: no arm compares with a teacher; "
                "give an arm an objective such as {forward_kl: 1}, or remove teacher_correction"
            )
        return self

    @model_validator(mode="after")
    def _matched_states_are_of_one_size(self) -> Self:
        for number, (name, recipe) in enumerate(self.prunings.items()):
            for arm, asked in recipe.train.arms.items():
                where = f"steps.{number}.arm" if name else f"train.arms.{arm}"
                if asked.objective.matches and recipe.width is not None and recipe.width.hidden is not None:
                    raise ValueError(
                        f"{where} compares hidden states, and with width.hidden the student's are shorter "
                        "than the teacher's; remove one of the two"
                    )
                if asked.objective.matches and number and recipe.distil_from == "original":
                    raise ValueError(
                        f"{where} compares hidden states block by block, and the blocks of this student are those of "
                        "the model before this step, not of the original: set distil_from: previous"
                    )
        return self

    @model_validator(mode="after")
    def _cached_signals_are_generated(self) -> Self:
        for where, arm in self._arms():
            for term, product in arm.objective.cached.items():
                if not getattr(self.generate, product):
                    raise ValueError(f"{where}: {term} needs generate.{product}, which is off")
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        taken = {f"step{number}" for number in range(1, len(self.steps) + 1)} | ({"patched"} if self.patch else set())
        for name in (*self.train.arms, *self.merged):
            if name in taken:
                raise ValueError(f"{name!r} is the name of another model of this recipe; rename the arm or the merge")
        return self

    def _arms(self) -> Iterator[tuple[str, Arm]]:
        """All arms, with where they stand."""
        yield from ((f"steps.{index}.arm", step.arm) for index, step in enumerate(self.steps))
        yield from ((f"train.arms.{name}", arm) for name, arm in self.train.arms.items())

    @model_validator(mode="after")
    def _merges_have_arms(self) -> Self:
        names = [student for name, merge in self.merges.items() for student in merge.students(name)]
        taken = {"teacher", "pruned", *self.train.arms}
        for name in names:
            if name in taken or not name.isidentifier() or names.count(name) > 1:
                raise ValueError(f"{name!r} is not a valid merge name: use letters, digits and _, each name once")
        for merge in self.merges.values():
            stray = [arm for arm in merge.arms if arm not in self.train.arms]
            if stray or merge.arms[0] == merge.arms[1]:
                raise ValueError(f"a merge takes two different arms of train.arms, not {' and '.join(merge.arms)}")
        return self

    @classmethod
    def parse(cls, data: Any, *, base: Path | None = None, origin: str = "recipe", stored: bool = False) -> Recipe:
        """Validate plain data. Raises `RecipeError` that names the field and, if near, the one meant.

        `stored` is for what an earlier version wrote: old names of fields then give no warning.
        """
        try:
            return cls.model_validate(as_frozen(data), context={"base": base, **(STORED if stored else {})})
        except ValidationError as error:
            raise RecipeError(*describe_validation_error(error, cls, origin)) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file; relative paths inside it start at its folder. Raises `RecipeError`."""
        path = Path(path)
        return cls.parse(read_yaml(path, RecipeError), base=path.resolve().parent, origin=str(path))

    def to_yaml(self) -> str:
        """The recipe without fields that equal their default."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        for part, written in ((self, content), *zip(self.steps, content.get("steps", ()), strict=True)):
            if "depth" in part.model_fields_set:  # even one that keeps every block is said on purpose
                written["depth"] = part.depth.model_dump(mode="json", exclude_defaults=True)
        return dump_yaml({name: content[name] for name in (*_FIRST, *content) if name in content})
