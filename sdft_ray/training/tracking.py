"""The figures of a training run in TensorBoard, MLflow or Weights & Biases, beside its own history.

    check_trackers(["tensorboard"], directory)          # before training
    with build_trackers(["tensorboard"], project="quickstart", run_name="sft", directory=directory) as trackers:
        train(..., report=lambda record: trackers.log(record.step, values_of(record, plan.num_steps)))

`directory` is a folder, or the URL of one, that belongs to this training alone and outlives it. An attempt that finds
an earlier one's traces there continues its run. Each tracker works in a thread of its own: a slow one holds nothing up,
and one that fails is dropped with a warning. What each writes where is said in `trackers`.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, Self

from sdft_ray.errors import ResourceError
from sdft_ray.training.plan import StepRecord

_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
"""What each tracker needs: any one of these."""
_MAX_WAITING = 10_000
"""Steps that a tracker may lag behind before it is dropped."""
_CLOSE_S = 60.0
"""How long the end of training waits for a tracker, in all."""

_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes named figures by step, steps rising from one call to the next."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, finished: bool = True) -> None:
        """Write what is still held. `finished`: training came to its end."""
        ...


def values_of(record: StepRecord, num_steps: int) -> dict[str, float]:
    """What trackers get of a step; `eta_s` is the time left at this step's pace. What was not measured is left out."""
    measured = {
        "loss": record.loss,
        **{f"terms/{name}": value for name, value in record.terms.items()},
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "tokens_per_s": record.tokens_per_s,
        "mfu": record.mfu,
        "peak_memory_bytes": record.peak_memory_bytes,
        "eta_s": (num_steps - record.step) * record.wall_s,
    }
    return {name: float(value) for name, value in measured.items() if value is not None}


def check_trackers(names: Iterable[str], directory: str) -> None:
    """Raise `ResourceError` for a tracker that is not installed, or cannot write to `directory`, a path or a URL."""
    for name in names:
        if not any(find_spec(module) for module in _MODULES[name]):
            raise ResourceError(
                f"train.tracking asks for {name}, which is not installed",
                f"pip install {name}, on every machine that trains, or leave it out",
            )
        if "://" in directory:
            _check_remote(name, directory)


def _check_remote(name: str, directory: str) -> None:
    """What a tracker needs where there is no folder to write to."""
    needs = {
        "tensorboard": (find_spec("tensorboard"), "tensorboardX alone cannot write there: pip install tensorboard"),
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI"), "set MLFLOW_TRACKING_URI to a server"),
        "wandb": (
            os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_DIR"),
            "set WANDB_API_KEY, or WANDB_DIR to a folder for offline runs",
        ),
    }
    has, hint = needs[name]
    if not has:
        raise ResourceError(f"train.tracking: {name} has nowhere to write with a store at {directory}", hint)


def build_trackers(
    names: Iterable[str],
    *,
    project: str,
    run_name: str,
    directory: str,
    config: Mapping[str, Any] | None = None,
) -> Trackers:
    """Trackers by name; none for no names. `config` is shown with the run: plain values, nothing secret.

    They are opened in their threads, so that a server that does not answer counts as a failure on the way. Raises as
    `check_trackers`.
    """
    names = tuple(dict.fromkeys(names))
    check_trackers(names, directory)

    def opener(name: str) -> Callable[[], Tracker]:
        def opened() -> Tracker:
            from sdft_ray.training import trackers

            return trackers.TRACKERS[name](project, run_name, directory, config or {})

        return opened

    return Trackers({name: opener(name) for name in names})


class Trackers:
    """Several trackers as one, fed in the background. As a context manager it ends them, in good or bad order."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]], *, close_s: float = _CLOSE_S) -> None:
        self._feeds = [_Feed(name, opener) for name, opener in openers.items()]
        self._close_s = close_s

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Returns at once."""
        for feed in self._feeds:
            feed.put(step, values)

    def close(self, *, finished: bool = True) -> None:
        """Wait until all is written, but not for ever."""
        for feed in self._feeds:
            feed.end(finished)
        for feed in self._feeds:
            feed.join(self._close_s / len(self._feeds))

    @property
    def failures(self) -> dict[str, str]:
        """Why a tracker was dropped, by name."""
        return {feed.name: feed.failure for feed in self._feeds if feed.failure}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)


class _Feed:
    """One tracker in its thread. After its first failure it takes nothing more."""

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        self.name = name
        self.failure = ""
        self._open = opener
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        if self.failure:
            return
        if self._waiting.qsize() >= _MAX_WAITING:
            self._fail(f"it is {_MAX_WAITING} steps behind")
        self._waiting.put((step, values))

    def end(self, finished: bool) -> None:
        self._waiting.put(finished)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail(f"it did not end within {timeout_s:.0f} s")

    def _run(self) -> None:
        try:
            tracker = self._open()
            while not isinstance(entry := self._waiting.get(), bool):
                if self.failure:
                    return
                tracker.log(*entry)
            tracker.close(finished=entry)
        except Exception as error:  # noqa: BLE001  (whatever goes wrong in a tracker, training goes on)
            self._fail(f"{type(error).__name__}: {_without_secrets(str(error))}")

    def _fail(self, why: str) -> None:
        if not self.failure:
            self.failure = why
            _log.warning("training goes on without %s: %s", self.name, why)


def _without_secrets(text: str) -> str:
    """The first line of an error, which may quote an address or a key."""
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "…")
    return re.sub(r"://[^/@\s]*@", "://", text.strip().partition("\n")[0])
