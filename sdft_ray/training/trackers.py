"""TensorBoard, MLflow and Weights & Biases, each imported when one of its kind is made.

    tensorboard    event files in the directory, a URL too where `tensorboard` is installed;
                   see them with `tensorboard --logdir DIR`
    mlflow         to MLFLOW_TRACKING_URI, else `mlflow.db` in the parent directory;
                   see it with `mlflow ui --backend-store-uri sqlite:///PARENT/mlflow.db`
    wandb          to its service if WANDB_API_KEY is set, else offline in the directory;
                   send that with `wandb sync DIR/wandb/offline-run-*`

MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_MODE and the others that MLflow and Weights & Biases read themselves are
theirs. An SQLite file wants a local disk: on a cluster use a server.
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
from typing import Any

import fsspec

from sdft_ray.training.tracking import Tracker

_FLUSH_S = 10
_SEND_S = 5.0
"""MLflow gets the figures of quick steps so often: a message takes it some 10 ms of a processor."""
_SEND_METRICS = 500  # it takes 1,000 at once


class TensorBoard:
    """Event files, by torch's writer, or by tensorboardX where tensorboard is not installed.

    The first step that is logged hides what an attempt that died had written from there on.
    """

    def __init__(self, project: str, run_name: str, directory: str, config: Mapping[str, Any]) -> None:
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        else:
            from tensorboardX import SummaryWriter
        self._make: Callable[..., Any] = SummaryWriter
        self._directory = directory
        self._config = json.dumps({"project": project, "run": run_name, **config}, indent=1, default=str)
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        if self._writer is None:
            self._writer = self._make(self._directory, purge_step=step, flush_secs=_FLUSH_S)
            self._writer.add_text("config", "\n".join(f"    {line}" for line in self._config.splitlines()), step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool = True) -> None:
        """Write the rest."""
        del finished
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """One run of an experiment named like the project. Its id is kept in the directory.

    A step that two attempts made is there twice, with equal figures: MLflow forgets nothing.
    """

    def __init__(self, project: str, run_name: str, directory: str, config: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        server = os.environ.get("MLFLOW_TRACKING_URI")
        if not server:
            Path(directory).mkdir(parents=True, exist_ok=True)
        self._held: list[Any] = []
        self._sent = 0.0
        self._client = MlflowClient(server or f"sqlite:///{Path(directory).parent / 'mlflow.db'}")

        def create() -> str:
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or project)
            run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
            for name, value in config.items():
                self._client.log_param(run_id, name, value)
            return run_id

        self._run_id = _kept(directory, "mlflow_run_id", create)
        try:
            self._client.update_run(self._run_id, status="RUNNING")
        except MlflowException:  # of another server, or deleted there
            self._run_id = _kept(directory, "mlflow_run_id", create, anew=True)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        if self._client.get_experiment_by_name(name) is None:
            with contextlib.suppress(MlflowException):  # another arm's training may be first
                self._client.create_experiment(name)
        found = self._client.get_experiment_by_name(name)
        assert found is not None, "the experiment was made"
        return found.experiment_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values for the next message, and send it when it is time."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        self._held += [Metric(name, value, now_ms, step) for name, value in values.items()]
        if time.monotonic() - self._sent >= _SEND_S or len(self._held) >= _SEND_METRICS:
            self._send()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._client.log_batch(self._run_id, held)
        self._sent = time.monotonic()

    def close(self, *, finished: bool = True) -> None:
        """Send the rest, and say how the run ended."""
        self._send()
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")


class WandB:
    """One run, whose id is kept in the directory. Neither code nor machine nor command line is sent.

    Weights & Biases takes no step twice: of those that two attempts made it shows the first. Offline, each attempt
    makes a folder of its own; send the later ones with `wandb sync --append`.
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
            id=_kept(directory, "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            mode=mode,
            dir=None if remote else directory,
            config=dict(config),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, x_disable_meta=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values to its own process."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool = True) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=0 if finished else 1)


TRACKERS: Mapping[str, Callable[[str, str, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def _kept(directory: str, name: str, make: Callable[[], str], *, anew: bool = False) -> str:
    """The text of a small file, which is made when missing, or `anew`."""
    files, folder = fsspec.core.url_to_fs(directory)
    path = f"{folder}/{name}"
    if not anew and files.exists(path):
        return files.cat_file(path).decode()
    value = make()
    files.makedirs(folder, exist_ok=True)
    files.pipe_file(path, value.encode())
    return value
