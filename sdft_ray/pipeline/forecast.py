"""How long a run takes: seconds of each step from what probes found, and the schedule that follows from them.

Nothing runs here. A step that no probe says anything about has no time, and the total is a lower bound then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdft_ray.generation.pace import Pace
from sdft_ray.models.size import ModelSize
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, Step
from sdft_ray.stages.spec import STAGES, demand
from sdft_ray.stages.views import train_view, trial_view
from sdft_ray.training.plan import arm_plan

if TYPE_CHECKING:
    from sdft_ray.stages.probes import TaskTime, Timed, TrainTimes

_BYTES_PER_S = 300 * 2**20
"""At least what a disk takes of a checkpoint: a part of a stage that is short beside the rest."""
_PACKED = 0.95
"""Share of packed rows that documents fill."""
_GAP_ROWS = 64
"""Of `stages.gap`: after so many rows the error is looked at, and for most sets it is small enough then."""
_TRAINER_S = 5.0
"""What Ray Train adds before workers begin: its controller, and a group of processes."""


@dataclass(frozen=True)
class Texts:
    """Of the seed set: rows, mean tokens of a row with its reference and as selection leaves it, both as documents;
    tokens of prompt and responses that generation takes for a row; share of rows whose rewrite is kept.
    """

    num_rows: int
    reference_tokens: float
    selected_tokens: float
    prompt_tokens: float
    response_tokens: float
    kept: float


@dataclass(frozen=True)
class Measured:
    """What probes found; None or nothing where one was not made or did not end well."""

    read_s: float
    light_s: float
    """A task that needs no model, from asking for it to its end."""
    generate_start_s: float = 0.0
    pace: Pace = field(default_factory=lambda: Pace(0.0, 0.0, 0.0))
    judge_s: float = 0.0
    nll: Timed | None = None
    measure: Timed | None = None
    train: Mapping[str, TrainTimes] = field(default_factory=dict)
    """By what `train_key` says of a step."""
    speed: Timed | None = None
    engine_start_s: float = 0.0
    engine_change_s: float = 0.0
    """Engines of an evaluation, until they answer: with the first model, and with the next."""
    tasks: Sequence[TaskTime] = ()


def train_key(step: Step) -> str:
    """What the time of a training depends on, of all that differs between the arms of a recipe: size and objective."""
    subject = step.label if step.label.startswith("step") else ""
    return f"{subject} {trial_view(step).objective.model_dump_json()}"


class Forecast:
    """Seconds of the steps of a recipe. `sizes` are those after each pruning, by its name, `teacher` the teacher's."""

    def __init__(
        self,
        recipe: Recipe,
        resources: Resources,
        teacher: ModelSize,
        sizes: Mapping[str, ModelSize],
        found: Measured,
        texts: Texts,
        num_generate_actors: int,
    ) -> None:
        self._recipe, self._resources, self._found = recipe, resources, found
        self._teacher, self._sizes = teacher, sizes
        self._read = texts
        self._num_actors = num_generate_actors

    def seconds(self, step: Step) -> float | None:
        """None where no probe says anything."""
        how: Callable[[Step], float | None] | None = getattr(self, f"_{step.stage}", None)
        return how(step) if how else None

    def _ratio(self, step: Step) -> float:
        """Work of the model that a step is about, over the teacher's."""
        if step.subject == "teacher":
            return 1.0
        size = self._sizes.get(step.subject, self._sizes[""])
        return size.matmul_flops_per_token / self._teacher.matmul_flops_per_token

    def _load_s(self) -> float | None:
        return None if self._found.nll is None else self._found.nll.start_s

    def _seed(self, step: Step) -> float:
        asks = sum(task.start_s for task in self._found.tasks) + self._found.light_s
        return self._found.read_s + (asks if "tasks" in step.slice else 0.0)

    def _calibration(self, step: Step) -> float:
        return self._found.read_s

    def _plan(self, step: Step) -> float:
        return 0.2

    _choose = _plan

    def _report(self, step: Step) -> float:
        return 2.0

    def _measure(self, step: Step) -> float | None:
        probe = self._found.measure
        if probe is None:
            return None
        return probe.start_s + math.ceil(probe.num_units / self._resources.measure.num_tasks) * probe.unit_s

    def _patch(self, step: Step) -> float | None:
        probe = self._found.measure
        return None if probe is None else 2 * (probe.start_s + probe.num_units * probe.unit_s)

    def _prune(self, step: Step) -> float | None:
        load_s = self._load_s()
        return (
            None
            if load_s is None
            else load_s + self._sizes.get(step.subject, self._sizes[""]).weight_bytes / _BYTES_PER_S
        )

    _merge = _prune

    def _generate(self, step: Step) -> float:
        found, texts, settings = self._found, self._read, self._resources.generate
        num_running = settings.server.max_in_flight if settings.server else settings.max_sequences
        share = texts.num_rows / self._num_actors
        running = max(1, min(num_running, math.ceil(share)))
        work_s = found.pace.seconds(share * texts.prompt_tokens, share * texts.response_tokens, running)
        return found.generate_start_s + work_s

    def _select(self, step: Step) -> float:
        return self._found.light_s + self._read.num_rows * self._found.judge_s

    def _pair_tokens(self, most: float = math.inf) -> float:
        """Tokens of references and rewrites that one model scores, of at most `most` rows."""
        texts = self._read
        num_rows = min(most, self._recipe.gap.num_rows, texts.kept * texts.num_rows)
        return num_rows * (texts.reference_tokens + texts.selected_tokens)

    def _gap(self, step: Step) -> float | None:
        probe = self._found.nll
        if probe is None:
            return None
        work = {"": 1.0, "corrected": 2.0}.get(step.subject, self._ratio(step))
        return probe.start_s + work * self._pair_tokens(_GAP_ROWS) * probe.unit_s

    def _forget(self, step: Step) -> float | None:
        probe, asked = self._found.nll, self._recipe.forgetting
        if probe is None or asked is None:
            return None
        tokens = asked.num_rows * asked.max_tokens + self._pair_tokens()
        return probe.start_s + self._ratio(step) * tokens * probe.unit_s

    def _texts(self, step: Step) -> float:
        return self._found.read_s

    def _train(self, step: Step) -> float | None:
        times = self._found.train.get(train_key(step))
        size = self._sizes.get(step.label, self._sizes[""])
        return None if times is None else self._training(step, times, size, 1.0)

    def _correct(self, step: Step) -> float | None:
        times = next(iter(self._found.train.values()), None)
        if times is None:
            return None
        ratio = self._teacher.matmul_flops_per_token / self._sizes[""].matmul_flops_per_token
        return self._training(step, times, self._teacher, ratio)

    def _training(self, step: Step, times: TrainTimes, size: ModelSize, ratio: float) -> float:
        """For a model with `ratio` times the work of the probe's."""
        asked, trial, settings, texts = train_view(step), trial_view(step), self._resources.train, self._read
        num_rows = trial.num_rows or texts.num_rows * (1 - asked.validation_fraction)
        tokens = texts.selected_tokens if trial.data == "distilled" else texts.reference_tokens
        packed = max(1, math.ceil(num_rows * min(tokens, asked.max_seq_len) / asked.max_seq_len / _PACKED))
        plan = arm_plan(asked, step.label, settings, packed)
        per_worker = math.ceil(plan.rows_per_step / settings.min_workers)
        # The last micro-batch of a step may be smaller, and its work is in proportion to its rows.
        step_s = per_worker / plan.micro_batch_rows * times.micro_batch_s + times.update_s
        held_out = packed * asked.validation_fraction / plan.micro_batch_rows / settings.min_workers
        work_s = plan.num_steps * step_s + held_out * times.micro_batch_s / 3
        return _TRAINER_S + times.start_s + ratio * work_s + size.weight_bytes / _BYTES_PER_S

    def _evaluate(self, step: Step) -> float | None:
        if not self._found.tasks:
            return None
        asking_s = sum(task.item_s * task.num_items for task in self._found.tasks)
        starting_s = sum(task.start_s for task in self._found.tasks)
        found = self._found  # the teacher is the first, and the engines stay up for the others
        engine_s = found.engine_start_s if step.subject == "teacher" else found.engine_change_s
        return engine_s + starting_s + self._ratio(step) * asking_s

    def _speed(self, step: Step) -> float | None:
        probe = self._found.speed
        if probe is None:
            return None
        return probe.start_s + (self._recipe.speed.rounds + 1) * (1 + self._ratio(step)) * probe.unit_s


def wall_seconds(
    states: Sequence[State], seconds: Mapping[str, float], resources: Resources, cpus: float, gpus: float
) -> float:
    """When the last step ends, if steps start in their order as soon as their inputs are made and their share is free.

    Steps that are done take no time; neither do those without an entry in `seconds`. The rules of admission are those
    of `pipeline.scheduler.Scheduler`.
    """
    ended = {state.step.name for state in states if state.status == "done"}
    waiting = [state.step for state in states if state.status != "done"]
    running: dict[str, tuple[float, Step]] = {}
    now = 0.0
    while waiting or running:
        for step in list(waiting):
            others = [other for _, other in running.values()]
            if set(step.inputs.values()) <= ended and _fits(step, others, resources, cpus, gpus):
                running[step.name] = (now + seconds.get(step.name, 0.0), step)
                waiting.remove(step)
        if not running:  # a step whose share is larger than the machine; the run refuses it
            break
        name, (now, _) = min(running.items(), key=lambda item: item[1][0])
        del running[name]
        ended.add(name)
    return now


def _fits(step: Step, others: Sequence[Step], resources: Resources, cpus: float, gpus: float) -> bool:
    if STAGES[step.stage].one_at_a_time and any(other.stage == step.stage for other in others):
        return False
    want, held = demand(step.stage, resources), [demand(other.stage, resources) for other in others]
    if want.cpus and any(other.alone for other in held):
        return False
    if want.alone and any(other.cpus for other in held):
        return False
    slack = 1e-6
    return (
        want.cpus + sum(other.cpus for other in held) <= cpus + slack
        and want.gpus + sum(other.gpus for other in held) <= gpus + slack
    )
