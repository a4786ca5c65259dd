"""TensorBoard, MLflow and Weights & Biases behind one interface; each package is imported when its tracker is created.

    tensorboard    event files in the directory, a URL too where `tensorboard` is installed;
                   see them with `tensorboard --logdir DIR`
    mlflow         to MLFLOW_TRACKING_URI, else `mlflow.db` in the parent directory;
                   see it with `mlflow ui --backend-store-uri sqlite:///PARENT/mlflow.db`
    wandb          to its service if WANDB_API_KEY is set, else offline in the directory;
                   send that with `wandb sync DIR/wandb/offline-run-*`

The variables that MLflow and Weights & Biases read themselves (MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_MODE, ...)
keep their meaning. An SQLite file needs a local disk: on a cluster use a server.

`accelerate.tracking` was tried in place of these classes and refused (docs/libraries.md): it marks a failed training as
finished, flushes TensorBoard and sends a message to MLflow at every step, and cannot resume a deleted run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import fsspec

_FLUSH_S = 10
_SEND_S = 5.0
"""Time between two messages to MLflow: each takes 5 to 10 ms of CPU time, more than some training steps."""
_SEND_METRICS = 500  # MLflow accepts 1,000 in one message


class Tracker(Protocol):
    """Receives named values by training step; steps rise from one call to the next."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, finished: bool = True) -> None:
        """Write what is still buffered. `finished` is False if training failed or was stopped."""
        ...


class TensorBoard:
    """Event files, written by `torch.utils.tensorboard`, or by tensorboardX where tensorboard is not installed.

    On resume, TensorBoard discards the steps that a previous attempt wrote from the first resumed step on.
    """

    def __init__(self, project: str, run_name: str, directory: str, config: Mapping[str, Any]) -> None:
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        else:
            from tensorboardX import SummaryWriter
        self._writer_class: Callable[..., Any] = SummaryWriter
        self._directory = directory
        self._config = json.dumps({"project": project, "run": run_name, **config}, indent=1, default=str)
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        if self._writer is None:
            self._writer = self._writer_class(self._directory, purge_step=step, flush_secs=_FLUSH_S)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in self._config.splitlines()), step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool = True) -> None:
        """Flush and close the event file."""
        del finished
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """One run of the experiment named after the project. Its id is stored in the directory, and resumed from there.

    A step that two attempts computed is logged twice, with equal values: MLflow deletes nothing.
    """

    def __init__(self, project: str, run_name: str, directory: str, config: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        server = os.environ.get("MLFLOW_TRACKING_URI")
        if not server:
            Path(directory).mkdir(parents=True, exist_ok=True)
        self._pending: list[Any] = []
        self._last_sent = 0.0
        self._client = MlflowClient(server or f"sqlite:///{Path(directory).parent / 'mlflow.db'}")

        def create() -> str:
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or project)
            run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
            for name, value in config.items():
                self._client.log_param(run_id, name, value)
            return run_id

        self._run_id = _stored(directory, "mlflow_run_id", create)
        try:
            self._client.update_run(self._run_id, status="RUNNING")
        except MlflowException:  # the run is on another server, or was deleted
            self._run_id = _stored(directory, "mlflow_run_id", create, replace=True)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        if self._client.get_experiment_by_name(name) is None:
            with contextlib.suppress(MlflowException):  # another training run may create it at the same time
                self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name)
        assert experiment is not None, "the experiment was created above"
        return experiment.experiment_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Buffer the values; send the buffer every `_SEND_S` seconds."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        self._pending += [Metric(name, value, now_ms, step) for name, value in values.items()]
        if time.monotonic() - self._last_sent >= _SEND_S or len(self._pending) >= _SEND_METRICS:
            self._send()

    def _send(self) -> None:
        metrics, self._pending = self._pending, []
        if metrics:
            self._client.log_batch(self._run_id, metrics)
        self._last_sent = time.monotonic()

    def close(self, *, finished: bool = True) -> None:
        """Send the buffer, and set the final status of the run."""
        self._send()
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")


class WandB:
    """One run, whose id is stored in the directory. Source code, machine details and command line are not sent.

    Weights & Biases accepts each step once: of a step that two attempts computed it shows the first. Offline, each
    attempt creates its own folder; upload the later ones with `wandb sync --append`.
    """

    def __init__(self, project: str, run_name: str, directory: str, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        remote = "://" in directory
        if not remote:
            Path(directory).mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE") or "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            name=run_name,
            id=_stored(directory, "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            mode=mode,
            dir=None if remote else directory,
            config=dict(config),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values to the process that W&B runs."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool = True) -> None:
        """Wait until everything is written or uploaded."""
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: Mapping[str, Callable[[str, str, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def _stored(directory: str, name: str, create: Callable[[], str], *, replace: bool = False) -> str:
    """The text of the file `name`; written with `create()` if it is missing, or always with `replace`."""
    files, folder = fsspec.core.url_to_fs(directory)
    path = f"{folder}/{name}"
    if not replace and files.exists(path):
        return files.cat_file(path).decode()
    value = create()
    files.makedirs(folder, exist_ok=True)
    files.pipe_file(path, value.encode())
    return value
