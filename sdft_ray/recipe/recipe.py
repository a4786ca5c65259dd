"""The recipe: the identity of one compression. Strict, frozen, YAML in and out.

A recipe says *what* is made; `sdft_ray.recipe.resources.Resources` says how it is executed. Two recipes with equal
content name the same artifacts, whatever file, machine or order of keys they come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.arms import Arm, Merge, TeacherCorrection, Train
from sdft_ray.recipe.inputs import Calibration, Chat, Forgetting, Place, SeedSet, Teacher
from sdft_ray.recipe.pruning import Pruning
from sdft_ray.recipe.scoring import Evaluate, Release, Speed
from sdft_ray.recipe.yaml_model import (
    STORED,
    StrictPart,
    as_frozen,
    describe_validation_error,
    dump_yaml,
    read_yaml,
)

MAX_TOP_LOGPROBS = 128
"""Maximum number of log-probabilities stored per token."""


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
    """Maximum number of rows to score, among those with an accepted rewrite."""
    max_stderr: float = Field(default=0.05, gt=0)
    """Scoring stops, at the earliest after 64 rows, when the gap's standard error is no more, in nats per token."""


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
