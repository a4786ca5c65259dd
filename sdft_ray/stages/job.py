"""The input and the result of a stage. Both are small and can be pickled: addresses, never models or open files."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sdft_ray.evaluation.task_plans import TaskPlaces
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.resources import Device, Resources
from sdft_ray.stages.graph import Step
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.manifest import FileEntry, Usage
from sdft_ray.store.store import Store

if TYPE_CHECKING:
    import psutil


class Progress(Protocol):
    """Tells how far a step is; `total` is 0 while unknown. Cheap enough for every row."""

    def __call__(self, done: int, total: int, unit: str) -> None: ...


@runtime_checkable
class PhasedProgress(Progress, Protocol):
    """A `Progress` that also takes phases, parts and sentences. Where a plain function counts, these tell nothing."""

    def phase(self, text: str) -> None: ...
    def part(self, name: str) -> Progress: ...
    def tell(self, sentence: str) -> None: ...


@dataclass(frozen=True)
class Places:
    """Where the content from outside lies that a step reads. Identity holds its digest or commit in place of these."""

    rows: tuple[str, str | None] | None = None
    """Source of the rows and its revision."""
    tasks: TaskPlaces = field(default_factory=TaskPlaces)
    """Folders of further lm-eval tasks and of their data."""
    embedding: ModelSource | None = None


@dataclass(frozen=True)
class StageContext:
    """One step to run: its slice of the recipe, and what it takes to execute it.

    No other part of the recipe is here, so that no stage can read what its identity does not hold.
    """

    step: Step
    address: str
    store_url: str
    recipe_name: str
    """For people: labels of metrics and trackers."""
    resources: Resources
    teacher: TeacherModel
    inputs: dict[str, str]
    """Role -> address of a committed artifact."""
    progress: Progress
    places: Places = Places()
    identity: dict[str, Any] = field(default_factory=dict)
    """What the step's fingerprint was computed from."""
    driver: str = ""
    """Host of the driver: `Store.lock` admits one driver of each host to a step."""

    @property
    def slice(self) -> dict[str, Any]:
        """What identity takes from the recipe; `views.view` makes typed parts of it."""
        return self.step.slice

    @property
    def store(self) -> Store:
        return Store(self.store_url)

    def phase(self, text: str) -> None:
        """Tell what the step does now, where nothing can be counted: "loading the engine"."""
        if isinstance(self.progress, PhasedProgress):
            self.progress.phase(text)

    def part(self, name: str) -> Progress:
        """Tells how far one part of the step is, whose figures are added to those of the others."""
        return self.progress.part(name) if isinstance(self.progress, PhasedProgress) else self.progress

    def notice(self, sentence: str) -> None:
        """Tell the user a sentence while the step runs."""
        if isinstance(self.progress, PhasedProgress):
            self.progress.tell(sentence)

    def input(self, role: str) -> Path:
        """Local directory of an input artifact, on whichever node this runs."""
        return self.store.path(self.inputs[role])

    def model(self, role: str) -> Path:
        """Local directory of a model: an input's checkpoint, or the teacher where there is no such input."""
        return self.input(role) if role in self.inputs else self.teacher.directory

    def work(self) -> Path:
        """Stable room for unfinished work."""
        return self.store.work(self.address)

    @contextlib.contextmanager
    def output(self, result: StageResult) -> Iterator[Path]:
        """An empty directory to fill; when the block ends well its files are placed and listed in `result`."""
        store = self.store
        directory = store.work(self.address) / f"output-{self.driver}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield directory
        result.files.update(store.place(self.address, directory))


@dataclass
class StageResult:
    """What a stage made: placed files, what it took, and small facts for the manifest."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    summary: dict[str, Any] = field(default_factory=dict)
    superseded: list[str] = field(default_factory=list)
    """Files of the store, relative to its root, that are of no more use once the step is committed."""


def remote_options(device: Device) -> dict[str, Any]:
    """Ray options for a worker that holds `device`."""
    options: dict[str, Any] = {"num_cpus": device.cpus}
    if device.gpus:
        options["num_gpus"] = device.gpus
    if device.resources:
        options["resources"] = device.resources
    if device.accelerator_type:
        options["accelerator_type"] = device.accelerator_type
    return options


class UsageMeter:
    """Measures wall time and this process's peak resident memory over a block.

    Peak memory is sampled from /proc every 50 ms, because a worker that served another step before carries that
    step's high-water mark.
    """

    def __init__(self, *, gpus: float = 0.0) -> None:
        self._gpus = gpus
        self._peak_rss_bytes = 0
        self._stop = threading.Event()

    def __enter__(self) -> UsageMeter:
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.wall_s = time.monotonic() - self._start

    def _watch(self) -> None:
        while True:
            self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes())
            if self._stop.wait(0.05):
                return

    def usage(self, num_tokens: int = 0) -> Usage:
        wall_s = time.monotonic() - self._start
        return Usage(wall_s, wall_s * self._gpus, self._peak_rss_bytes, num_tokens)


def node_id() -> str:
    """The Ray node that this process runs on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return _process(os.getpid()).memory_info().rss


@functools.cache
def _process(pid: int) -> psutil.Process:
    """Once per process: it reads a lot about itself."""
    import psutil

    return psutil.Process(pid)


def merge_usage(parts: list[Usage]) -> Usage:
    """Usage of workers that ran side by side: longest wall, everything else added."""
    return Usage(
        max(part.wall_s for part in parts),
        sum(part.device_s for part in parts),
        sum(part.peak_rss_bytes for part in parts),
        sum(part.num_tokens for part in parts),
    )
