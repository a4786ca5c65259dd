"""`sdft try`: a few rows rewritten by every template, and probes of the other stages, before a run.

Nothing is committed. Rewrites go to the row cache, from where a run takes those of its template.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sdft_ray.errors import UserError
from sdft_ray.generation.pace import Pace, constant_pace, fitted_pace
from sdft_ray.generation.prompts import TEMPLATES
from sdft_ray.generation.trial import Distance, Recommendation, TemplateTrial, recommend, trial_of
from sdft_ray.pipeline.draw import drawn_rows
from sdft_ray.pipeline.forecast import Forecast, Measured, Texts, train_key, wall_seconds
from sdft_ray.pipeline.interrupt import interrupts
from sdft_ray.pipeline.memory import plan_memory
from sdft_ray.pipeline.preflight import planned_configs, preflight
from sdft_ray.progress import Event, ViewName, open_run_view, teller
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, resolve
from sdft_ray.stages.job import StageContext, remote_options
from sdft_ray.stages.sources import Sources
from sdft_ray.store.store import Store

if TYPE_CHECKING:
    from sdft_ray.stages.probes import TaskTime, Timed, TrainTimes
    from sdft_ray.stages.session import Capacity
    from sdft_ray.stages.trials import Completions

RECIPES_OWN = "(the recipe's)"
"""Name of a template that the recipe has the text of."""
_SIZED_ROWS = 256
"""Rows whose tokens stand for those of the whole set."""
_ITEMS = 16
"""Items of each task that are asked."""
PROBES = {
    "rewrites": "generate",
    "distance": "gap",
    "measure": "measure",
    "train": "train",
    "speed": "speed",
    "evaluate": "evaluate",
}
"""Probe -> the stage that it speaks of."""


@dataclass(frozen=True)
class StepTime:
    """`seconds` is None where no probe says anything; `note` says that a step is done, or why there is no time."""

    step: str
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class Rehearsal:
    """`templates`: most kept first. `tokens_per_s` counts tokens of responses, with one engine as busy as here.

    `total_s` is that of the missing steps, side by side as the machine allows; a lower bound where a step has no time.
    """

    recipe: str
    template: str
    num_rows: int
    num_seed_rows: int
    templates: tuple[TemplateTrial, ...]
    recommendation: Recommendation
    tokens_per_s: float
    steps: tuple[StepTime, ...]
    total_s: float
    took_s: float


def rehearse(
    recipe: Recipe,
    store: str | Store = ".sdft",
    resources: Resources | None = None,
    *,
    num_rows: int = 32,
    view: ViewName = "auto",
) -> Rehearsal:
    """Try `num_rows` rows of the seed set, drawn over all of it by `generate.seed`.

    Raises as `compress` does before any worker starts, and `StageError` where the teacher cannot be sampled.
    """
    began = time.monotonic()
    store = store if isinstance(store, Store) else Store(store)
    resources = resources or Resources()
    store.check_writable()
    with open_run_view(view, list(PROBES), store.log_path(recipe.name)) as shown, interrupts():
        sources = Sources(recipe, store)
        states = resolve(recipe, store, sources)
        tell = teller(shown.handle)
        preflight(recipe, store, resources, states, sources.teacher, tell=tell)
        missing = {name: state for name, state in states.items() if state.status != "done"}
        planned = plan_memory(recipe, resources, sources.teacher, missing)
        for sentence in planned.assumed:
            tell(sentence)
        return _Rehearsal(recipe, store, planned.resources, states, sources, num_rows, shown.handle).run(began)


class _Rehearsal:
    """The probes, one after another, and what follows from them."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        resources: Resources,
        states: Mapping[str, State],
        sources: Sources,
        num_rows: int,
        show: Callable[[Event], None],
    ) -> None:
        self._recipe, self._store, self._resources = recipe, store, resources
        self._states, self._sources, self._show = states, sources, show
        self._teacher = sources.teacher
        self._failed: dict[str, str] = {}
        began = time.monotonic()
        self._sized, self._num_seed_rows = drawn_rows(recipe, store, states["seed"], max(num_rows, _SIZED_ROWS))
        self._read_s = time.monotonic() - began
        self._rows = self._sized[:num_rows]
        configs = planned_configs(recipe, self._teacher.fetched.config)
        self._configs: Mapping[str, Any] = configs or dict.fromkeys(recipe.prunings, self._teacher.fetched.config)

    def run(self, began: float) -> Rehearsal:
        from sdft_ray.stages.registry import check_capacity
        from sdft_ray.stages.session import ray_session

        missing = {state.step.stage for state in self._states.values() if state.status != "done"}
        with ray_session(self._resources) as capacity:
            check_capacity(missing | {"generate"}, self._resources, capacity)
            ready_s = time.monotonic() - began
            tried = self._rewrites()
            trials, nll = self._distances(tried)
            found = self._measured(tried, nll)
        texts = self._texts(tried)
        steps = self._step_times(found, texts, capacity)
        seconds = {step.step: step.seconds for step in steps if step.seconds is not None}
        wall_s = wall_seconds([*self._states.values()], seconds, self._resources, capacity.cpus, capacity.gpus)
        ranked = tuple(sorted(trials, key=lambda trial: -trial.num_own))
        return Rehearsal(
            recipe=self._recipe.name,
            template=_own_template(self._recipe),
            num_rows=len(self._rows),
            num_seed_rows=self._num_seed_rows,
            templates=ranked,
            recommendation=recommend(ranked, _own_template(self._recipe)),
            tokens_per_s=tried.tokens_per_s,
            steps=steps,
            total_s=ready_s + wall_s,
            took_s=time.monotonic() - began,
        )

    def _job(self, step: str, recipe: Recipe | None = None) -> StageContext:
        """The job of a step whose inputs are not there."""
        states = self._states if recipe is None else resolve(recipe, self._store, self._sources)
        state = states[step]
        return StageContext(
            step=state.step,
            address=state.address or f"{state.step.stage}/rehearsal",
            store_url=self._store.url,
            recipe_name=self._recipe.name,
            resources=self._resources,
            teacher=self._teacher,
            inputs={},
            progress=_nobody,
            places=self._sources.places(state.step),
            identity=state.identity,
            driver=platform.node(),
        )

    @contextmanager
    def _probe(self, name: str, *, must: bool = False) -> Iterator[None]:
        """Tell when a probe begins and ends. What one dies of is noted, unless nothing can be said without it."""
        self._show(Event("stage_started", name))
        began = time.monotonic()
        try:
            yield
        except Exception as reason:
            from sdft_ray.stages.failures import Scene, as_ours

            scene = Scene(name, PROBES[name], log=self._store.log_path(self._recipe.name))
            error = as_ours(scene, reason)
            self._show(Event("stage_failed", name, detail=str(error)))
            if must or isinstance(error, UserError):
                raise error from reason
            self._failed[name] = str(error)
        else:
            self._show(Event("stage_finished", name, wall_s=time.monotonic() - began))

    def _rewrites(self) -> _Tried:
        """All templates by the sampler of the run."""
        import ray

        from sdft_ray.stages.trials import TrialWriter

        jobs = {name: self._job("generate", _with_template(self._recipe, name)) for name in _templates(self._recipe)}
        with self._probe("rewrites", must=True):
            own = jobs[_own_template(self._recipe)]
            options = remote_options(self._resources.generate)
            writer: Any = ray.remote(TrialWriter).options(**options).remote(own)
            start_s: Any = ray.get(writer.start_s.remote(time.time()))
            judged, completions, judge_s = ray.get(writer.answer.remote(jobs, self._rows))
            ray.kill(writer)
        return _Tried(judged, completions, start_s, judge_s)

    def _distances(self, tried: _Tried) -> tuple[list[TemplateTrial], Timed | None]:
        """Trials with their distance from the teacher; references of rows are scored once for all templates."""
        import ray

        from sdft_ray.stages.probes import nll_probe

        trials = [trial_of(name, rows, *tried.mean_tokens(name)) for name, rows in tried.judged.items()]
        kept = {
            trial.name: [row for row, own in zip(tried.judged[trial.name], trial.is_own, strict=True) if own]
            for trial in trials
        }
        references = [(row, row["reference_response"]) for row in self._rows]
        texts = references + [(row, row["response"]) for rows in kept.values() for row in rows]
        probe = None
        with self._probe("distance"):
            options = remote_options(self._resources.gap)
            task: Any = ray.remote(nll_probe).options(**options)
            found, probe = ray.get(task.remote(self._job("gap"), texts, time.time()))
            of_reference = dict(zip((row["example_id"] for row in self._rows), found, strict=False))
            rewrites = iter(found[len(references) :])
            for index, trial in enumerate(trials):
                own = [next(rewrites) for _ in kept[trial.name]]
                pairs = [of_reference[row["example_id"]] for row in kept[trial.name]]
                trials[index] = replace(trial, distance=_distance(pairs, own))
        return trials, probe

    def _measured(self, tried: _Tried, nll: Timed | None) -> Measured:
        """The probes of all other stages that are still to be run."""
        import ray

        missing = {state.step.stage for state in self._states.values() if state.status != "done"}
        began = time.monotonic()
        ray.get(ray.remote(_nothing).options(num_cpus=0).remote())
        found = Measured(
            read_s=self._read_s,
            light_s=time.monotonic() - began,
            generate_start_s=tried.start_s,
            pace=tried.pace(self._resources),
            judge_s=tried.judge_s,
            nll=nll,
        )
        if "measure" in missing:
            found = replace(found, measure=self._measure())
        if "train" in missing:
            found = replace(found, train=self._train())
        if "speed" in missing:
            found = replace(found, speed=self._speed())
        if "evaluate" in missing:
            start_s, change_s, tasks = self._evaluate()
            found = replace(found, engine_start_s=start_s, engine_change_s=change_s, tasks=tasks)
        return found

    def _measure(self) -> Timed | None:
        import ray

        from sdft_ray.data.rows import read_source
        from sdft_ray.generation.checks import check_error
        from sdft_ray.models.families import num_blocks_of
        from sdft_ray.stages.probes import measure_probe

        with self._probe("measure"):
            rows = pa.concat_tables(read_source(self._recipe.calibration, check_error))
            job = self._job("measure")
            removed = num_blocks_of(self._teacher.fetched.config) - num_blocks_of(self._configs[""])
            dropped = max(1, removed) if "drops" in job.slice else 0
            task = ray.remote(measure_probe).options(**remote_options(self._resources.measure))
            return ray.get(task.remote(job, rows, dropped, time.time()))
        return None

    def _train(self) -> dict[str, TrainTimes]:
        """One probe for each size and objective, by as many workers side by side as the run has."""
        import ray

        from sdft_ray.models.families import num_blocks_of
        from sdft_ray.stages.probes import TrainTimes, train_probe

        settings = self._resources.train
        task: Any = ray.remote(train_probe).options(**remote_options(settings))
        texts = [(row, row["reference_response"]) for row in self._sized]
        num_blocks = num_blocks_of(self._teacher.fetched.config)
        steps = {
            train_key(s.step): s.step for s in self._states.values() if s.step.stage == "train" and s.status != "done"
        }
        found: dict[str, TrainTimes] = {}
        with self._probe("train"):
            for key, step in steps.items():
                config = self._configs.get(step.label, self._configs[""])
                job = self._job(step.name)
                asked = [task.remote(job, config, num_blocks, texts, time.time()) for _ in range(settings.min_workers)]
                times = ray.get(asked)
                found[key] = TrainTimes(
                    max(one.start_s for one in times),
                    max(one.micro_batch_s for one in times),
                    max(one.update_s for one in times),
                )
        return found

    def _speed(self) -> Timed | None:
        import ray

        from sdft_ray.stages.probes import speed_probe

        with self._probe("speed"):
            task = ray.remote(speed_probe).options(**remote_options(self._resources.speed))
            return ray.get(task.remote(self._job("speed"), self._recipe.speed, time.time()))
        return None

    def _evaluate(self) -> tuple[float, float, tuple[TaskTime, ...]]:
        """Seconds until engines answer, and until they do with another model; the tasks."""
        import ray

        from sdft_ray.stages.evaluators import acquire, release_idle
        from sdft_ray.stages.probes import TimedHarness

        with self._probe("evaluate"):
            job = self._job("evaluate:teacher")
            with acquire(self._resources.evaluate, TimedHarness) as crew:
                start_s, change_s = ray.get(crew.harness.open.remote(job, crew.engines, time.time()))
                tasks: Any = ray.get(crew.harness.time.remote(job, crew.engines, _ITEMS))
            release_idle()
            return start_s, change_s, tuple(tasks)
        return 0.0, 0.0, ()

    def _texts(self, tried: _Tried) -> Texts:
        """What the rows say of the whole seed set."""
        from sdft_ray.data.messages import row_prompt

        chat, name = self._teacher.chat, _own_template(self._recipe)

        def mean_tokens(rows: Sequence[Mapping[str, Any]], response: str) -> float:
            return sum(len(chat.encode(row_prompt(row), row[response]).ids) for row in rows) / len(rows)

        selected = tried.judged[name]
        # What rewriting changes is told by the rows that were rewritten, the rest by more rows.
        change = mean_tokens(selected, "response") - mean_tokens(selected, "reference_response")
        of_reference = mean_tokens(self._sized, "reference_response")
        prompt_tokens, response_tokens = tried.mean_tokens(name)
        kept = sum(row["reason"] == "kept" for row in selected) / len(selected)
        return Texts(self._num_seed_rows, of_reference, of_reference + change, prompt_tokens, response_tokens, kept)

    def _step_times(self, found: Measured, texts: Texts, capacity: Capacity) -> tuple[StepTime, ...]:
        from sdft_ray.models.size import size_of

        sizes = {name: size_of(config) for name, config in self._configs.items()}
        settings = self._resources.generate
        room = capacity.gpus / settings.gpus if settings.gpus else capacity.cpus / settings.cpus
        num_actors = max(settings.min_actors, min(settings.max_actors, int(room)))
        forecast = Forecast(self._recipe, self._resources, self._teacher.fetched.size, sizes, found, texts, num_actors)
        times = []
        for name, state in self._states.items():
            if state.status == "done":
                times.append(StepTime(name, 0.0, "done"))
                continue
            seconds = forecast.seconds(state.step)
            why = self._failed.get({"gap": "distance"}.get(state.step.stage, state.step.stage), "not estimated")
            times.append(StepTime(name, seconds, "" if seconds is not None else why))
        return tuple(times)


@dataclass(frozen=True)
class _Tried:
    """What the actor that rewrites hands back; see `TrialWriter.answer`."""

    judged: Mapping[str, list[dict[str, Any]]]
    completions: Completions
    start_s: float
    judge_s: float

    def mean_tokens(self, template: str) -> tuple[float, float]:
        """Tokens of prompts and of responses that a row takes, all its samples together."""
        rows = self.judged[template]
        return (
            sum(row["prompt_tokens"] for row in rows) / len(rows),
            sum(row["response_tokens"] for row in rows) / len(rows),
        )

    @property
    def tokens_per_s(self) -> float:
        """Tokens of responses."""
        last = max(self.completions.finished_s, default=0.0)
        return sum(self.completions.response_tokens) / last if last else 0.0

    def pace(self, resources: Resources) -> Pace:
        """vLLM runs all responses side by side; of the others only the whole time is known."""
        done, settings = self.completions, resources.generate
        if settings.sampler == "vllm" and len(done.finished_s) <= settings.max_sequences:
            return fitted_pace(done.finished_s, done.prompt_tokens, done.response_tokens)
        return constant_pace(max(done.finished_s, default=0.0), done.prompt_tokens, done.response_tokens)


def _templates(recipe: Recipe) -> list[str]:
    """Shipped templates by name, and the recipe's own where it is a text."""
    return [*TEMPLATES, *([RECIPES_OWN] if recipe.generate.template not in TEMPLATES else [])]


def _own_template(recipe: Recipe) -> str:
    return recipe.generate.template if recipe.generate.template in TEMPLATES else RECIPES_OWN


def _with_template(recipe: Recipe, name: str) -> Recipe:
    if name == RECIPES_OWN:
        return recipe
    return recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"template": name})})


def _distance(references: Sequence[Any], rewrites: Sequence[Any]) -> Distance | None:
    from sdft_ray.evaluation.shift import mean_nll, paired_gap

    if not rewrites:
        return None
    return Distance(len(rewrites), mean_nll(references), mean_nll(rewrites), paired_gap(references, rewrites))


def _nobody(done: int, total: int, unit: str) -> None:
    """Probes are too short for progress."""


def _nothing() -> None:
    """A task that starts a worker, and no more."""
