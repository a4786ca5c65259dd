"""Metrics of a training run sent to TensorBoard, MLflow or Weights & Biases, in addition to the stored history.

    check_trackers(["tensorboard"], directory)          # before training
    with build_trackers(["tensorboard"], project="quickstart", run_name="sft", directory=directory) as trackers:
        train(..., report=lambda record: trackers.log(record.step, values_of(record, plan.num_steps)))

`directory` is a folder, or its URL, that belongs to one training run and persists after it. An attempt that finds the
files of an earlier attempt there continues the same tracker run. Each tracker works in its own thread: a slow tracker
delays nothing, and a failing one is dropped with a warning. See `trackers` for what each writes, and where.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from sdft_ray.errors import ResourceError
from sdft_ray.training.plan import StepRecord
from sdft_ray.training.trackers import TRACKERS, Tracker

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
"""The packages that a tracker can use; one of them must be installed."""
_MAX_WAITING = 10_000
"""A tracker that lags behind by more steps is dropped."""
_CLOSE_S = 60.0
"""How long the end of training waits for all trackers together."""

_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_log = logging.getLogger(__name__)


def values_of(record: StepRecord, num_steps: int) -> dict[str, float]:
    """The metrics of a step by name, without those that were not measured.

    `eta_s` is the remaining time in seconds if all further steps take as long as this one.
    """
    metrics = {
        "loss": record.loss,
        **{f"terms/{name}": value for name, value in record.terms.items()},
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "tokens_per_s": record.tokens_per_s,
        "mfu": record.mfu,
        "peak_memory_bytes": record.peak_memory_bytes,
        "eta_s": (num_steps - record.step) * record.wall_s,
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def check_trackers(names: Iterable[str], directory: str) -> None:
    """Raise `ResourceError` for a tracker that is not installed, or cannot write to `directory`, a path or a URL."""
    for name in names:
        if not any(find_spec(module) for module in _MODULES[name]):
            raise ResourceError(
                f"train.tracking lists {name}, which is not installed",
                f"pip install {name} on every node that runs training workers, or remove it from train.tracking",
            )
        if "://" in directory:
            _check_remote(name, directory)


def _check_remote(name: str, directory: str) -> None:
    """Raise `ResourceError` unless the tracker can write without a local folder."""
    requirements = {
        "tensorboard": (find_spec("tensorboard"), "tensorboardX alone cannot write there: pip install tensorboard"),
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI"), "set MLFLOW_TRACKING_URI to a server"),
        "wandb": (
            os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_DIR"),
            "set WANDB_API_KEY, or WANDB_DIR to a folder for offline runs",
        ),
    }
    is_met, hint = requirements[name]
    if not is_met:
        raise ResourceError(f"train.tracking: {name} cannot write to a store at {directory}", hint)


def build_trackers(
    names: Iterable[str],
    *,
    project: str,
    run_name: str,
    directory: str,
    config: Mapping[str, Any] | None = None,
) -> Trackers:
    """Trackers by name; an empty `Trackers` if there are no names. `config` is shown with the run: plain values only,
    no secrets.

    Trackers are opened in their threads, so a server that does not answer counts as a failure during training. Raises
    `ResourceError` as `check_trackers` does.
    """
    names = tuple(dict.fromkeys(names))
    check_trackers(names, directory)
    return Trackers({name: partial(TRACKERS[name], project, run_name, directory, config or {}) for name in names})


class Trackers:
    """Several trackers behind one, fed in the background. As a context manager it closes them, also after an error."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]], *, close_s: float = _CLOSE_S) -> None:
        self._feeds = [_Feed(name, opener) for name, opener in openers.items()]
        self._close_s = close_s

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values to all trackers; returns at once."""
        for feed in self._feeds:
            feed.put(step, values)

    def close(self, *, finished: bool = True) -> None:
        """Wait until everything is written, but no longer than `close_s` seconds."""
        for feed in self._feeds:
            feed.end(finished)
        for feed in self._feeds:
            feed.join(self._close_s / len(self._feeds))

    @property
    def failures(self) -> dict[str, str]:
        """Why a tracker was dropped, by its name."""
        return {feed.name: feed.failure for feed in self._feeds if feed.failure}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)


class _Feed:
    """One tracker in its own thread. After its first failure it accepts nothing more."""

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        self.name = name
        self.failure = ""
        self._open = opener
        self._queue: queue.SimpleQueue[tuple[int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        if self.failure:
            return
        if self._queue.qsize() >= _MAX_WAITING:
            self._fail(f"it is {_MAX_WAITING} steps behind")
        self._queue.put((step, values))

    def end(self, finished: bool) -> None:
        self._queue.put(finished)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail(f"it did not end within {timeout_s:.0f} s")

    def _run(self) -> None:
        try:
            tracker = self._open()
            while not isinstance(entry := self._queue.get(), bool):
                if self.failure:
                    return
                tracker.log(*entry)
            tracker.close(finished=entry)
        except Exception as error:  # noqa: BLE001  (whatever goes wrong in a tracker, training goes on)
            self._fail(f"{type(error).__name__}: {_without_secrets(str(error))}")

    def _fail(self, why: str) -> None:
        if not self.failure:
            self.failure = why
            _log.warning("training continues without %s: %s", self.name, why)


def _without_secrets(text: str) -> str:
    """The first line of an error, which may quote an address or a key."""
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "…")
    return re.sub(r"://[^/@\s]*@", "://", text.strip().partition("\n")[0])
