"""Parts of a recipe that say how models are judged: tasks, bounds for a release, speed."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, WrapValidator, model_validator

from sdft_ray.recipe.inputs import Place
from sdft_ray.recipe.suites import with_suite
from sdft_ray.recipe.yaml_model import StrictPart, one_or_several


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
    """Tasks for teacher, pruned model and students. `suite: NAME`, or a list of names, sets the fields as in
    `sdft_ray.recipe.suites`; `tasks` beside it are further ones."""

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
