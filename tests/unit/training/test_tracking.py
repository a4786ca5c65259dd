"""Trackers by what they really wrote; what fails in one of them, and what must not."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sdft_ray.errors import ResourceError
from sdft_ray.training.plan import StepRecord
from sdft_ray.training.tracking import Tracker, Trackers, build_trackers, check_trackers, values_of

CONFIG = {"learning_rate": 1e-3, "betas": [0.9, 0.95]}
RECORD = StepRecord(
    step=3,
    loss=1.5,
    grad_norm=0.25,
    learning_rate=1e-3,
    num_tokens=100,
    num_loss_tokens=40,
    wall_s=0.5,
    terms={"cross_entropy": 1.5},
    tokens_per_s=200.0,
    mfu=0.4,
    peak_memory_bytes=2**20,
)


def test_values_of_a_step() -> None:
    values = values_of(RECORD, 10)
    assert values == {
        "loss": 1.5,
        "terms/cross_entropy": 1.5,
        "grad_norm": 0.25,
        "learning_rate": 1e-3,
        "tokens_per_s": 200.0,
        "mfu": 0.4,
        "peak_memory_bytes": 2.0**20,
        "eta_s": 3.5,
    }
    unmeasured = StepRecord(3, 1.5, 0.25, 1e-3, 100, 40, 0.5)
    assert values_of(unmeasured, 10).keys() == {"loss", "grad_norm", "learning_rate", "eta_s"}


def attempt(names: list[str], directory: str, steps: range, level: float) -> Trackers:
    """One attempt at a training: the loss is `level` + step."""
    with build_trackers(names, project="p", run_name="r", directory=directory, config=CONFIG) as trackers:
        for step in steps:
            trackers.log(step, {"loss": level + step, "terms/cross_entropy": 0.5})
    return trackers


def interrupted(names: list[str], directory: str) -> dict[str, str]:
    """Steps 1 to 5, then again from the checkpoint after step 3 to step 6; what failed on the way."""
    first = attempt(names, directory, range(1, 6), 10.0)
    time.sleep(1.1)  # event files are ordered by the second they were begun in
    second = attempt(names, directory, range(4, 7), 20.0)
    return first.failures | second.failures


EXPECTED = [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]
"""What TensorBoard shows of `interrupted`: what the second attempt did anew is from the second."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "url"])
def test_tensorboard_goes_on_where_training_does(place: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = str(tmp_path / "a b" / "run") if place == "folder" else f"memory://{tmp_path.name}/run"
    assert interrupted(["tensorboard"], directory) == {}
    files, folder = fsspec.core.url_to_fs(directory)
    assert len(files.ls(folder)) == 2
    shown = EventAccumulator(directory).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == EXPECTED
    assert [event.value for event in shown.Scalars("terms/cross_entropy")] == [0.5] * 6
    assert b"learning_rate" in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_tensorboardx_writes_where_tensorboard_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray brings tensorboardX along, so this needs nothing more."""
    without(monkeypatch, "tensorboard")
    assert interrupted(["tensorboard"], str(tmp_path)) == {}
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for path in sorted(tmp_path.iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):  # a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum
            length = int.from_bytes(data[start : start + 8], "little")
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            if event.HasField("session_log"):
                found = [(step, value) for step, value in found if step < event.step]
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
    assert found == EXPECTED


@pytest.mark.slow
def test_mlflow_goes_on_where_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert interrupted(["mlflow"], str(tmp_path / "run")) == {}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.001", "betas": "[0.9, 0.95]"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {(metric.step, metric.value) for metric in history} == {*EXPECTED, (4, 14.0), (5, 15.0)}
    client.delete_run(run.info.run_id)
    assert attempt(["mlflow"], str(tmp_path / "run"), range(1, 2), 0.0).failures == {}
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_mlflow_shows_a_failed_training_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers = build_trackers(["mlflow"], project="p", run_name="r", directory=str(tmp_path / "run"))
    trackers.log(1, {"loss": 1.0})
    trackers.close(finished=False)
    assert trackers.failures == {}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_wandb_is_offline_without_a_key_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert interrupted(["wandb"], str(tmp_path)) == {}
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {folder.name.rpartition("-")[2] for folder in folders} == {(tmp_path / "wandb_run_id").read_text()}
    assert all(list(folder.glob("*.wandb")) for folder in folders)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As on a machine where these are not installed."""

    def found(name: str) -> object:
        return None if name in packages else find_spec(name)

    monkeypatch.setattr("sdft_ray.training.tracking.find_spec", found)
    monkeypatch.setattr("sdft_ray.training.trackers.find_spec", found)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_told_before_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "tensorboard", "tensorboardX", "mlflow", "wandb")
    with pytest.raises(ResourceError, match=f"{name}, which is not installed → pip install {name}"):
        build_trackers([name], project="p", run_name="r", directory=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [("tensorboard", "pip install tensorboard"), ("mlflow", "MLFLOW_TRACKING_URI"), ("wandb", "WANDB_API_KEY")],
)
def test_a_tracker_without_a_place_beside_a_remote_store(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"tensorboardX", "mlflow", "wandb"}
    monkeypatch.setattr("sdft_ray.training.tracking.find_spec", lambda module: module if module in present else None)
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(variable, raising=False)
    check_trackers([name], "/some/folder")
    with pytest.raises(ResourceError, match=f"{name} cannot write to a store at.*s3://bucket.*{says}"):
        check_trackers([name], "s3://bucket")
    present.add("tensorboard")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_trackers([name], "s3://bucket")


class Noted:
    """A tracker that notes what it gets, and does `trouble` at every step."""

    def __init__(self, trouble: Callable[[int], None] = lambda step: None) -> None:
        self._trouble = trouble
        self.steps: list[int] = []
        self.finished: bool | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trouble(step)
        self.steps.append(step)

    def close(self, *, finished: bool = True) -> None:
        self.finished = finished


def down(step: int) -> None:
    if step >= 2:
        raise ConnectionError(f"https://me:hunter2@server does not answer key-of-mine at step {step}\nTraceback ...")


def test_a_failing_tracker_is_dropped_with_one_warning_and_no_secret(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-of-mine")
    failing, sound = Noted(down), Noted()
    with caplog.at_level(logging.WARNING), Trackers({"mlflow": lambda: failing, "wandb": lambda: sound}) as trackers:
        for step in range(1, 6):
            trackers.log(step, {"loss": 1.0})
            time.sleep(0.01)
    assert failing.steps == [1]
    assert failing.finished is None
    assert sound.steps == [1, 2, 3, 4, 5]
    assert trackers.failures == {"mlflow": "ConnectionError: https://server does not answer … at step 2"}
    assert [record.getMessage() for record in caplog.records] == [
        "training continues without mlflow: ConnectionError: https://server does not answer … at step 2"
    ]


def test_a_tracker_that_cannot_be_opened_is_dropped() -> None:
    def opener() -> Tracker:
        raise OSError(28, "No space left on device")

    with Trackers({"tensorboard": opener}) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert "No space left" in trackers.failures["tensorboard"]


def test_a_tracker_that_hangs_holds_nothing_up() -> None:
    released = threading.Event()
    hanging = Noted(lambda step: (released.wait(30), None)[1])
    trackers = Trackers({"wandb": lambda: hanging}, close_s=0.2)
    started = time.monotonic()
    for step in range(20_000):
        trackers.log(step, {"loss": 1.0})
    assert "10000 steps behind" in trackers.failures["wandb"]
    trackers.close()
    assert time.monotonic() - started < 5
    released.set()


def test_one_that_does_not_end_in_time_is_told() -> None:
    released = threading.Event()
    trackers = Trackers({"wandb": lambda: Noted(lambda step: (released.wait(30), None)[1])}, close_s=0.2)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert "did not end" in trackers.failures["wandb"]
    released.set()


def test_how_training_ended_is_told() -> None:
    trackers = [Noted(), Noted()]
    with Trackers({"mlflow": lambda: trackers[0]}) as good:
        good.log(1, {"loss": 1.0})

    def broken() -> None:
        with Trackers({"mlflow": lambda: trackers[1]}) as bad:
            bad.log(1, {"loss": 1.0})
            raise RuntimeError("training diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        broken()
    assert [tracker.finished for tracker in trackers] == [True, False]
    assert [tracker.steps for tracker in trackers] == [[1], [1]]


def test_no_trackers_are_imported_unless_asked_for() -> None:
    code = (
        "import sys; from sdft_ray.training.tracking import build_trackers;"
        "build_trackers((), project='p', run_name='r', directory='/nowhere').close();"
        "sys.exit(bool({'torch', 'tensorboard', 'tensorboardX', 'mlflow', 'wandb', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_records_without_cost_are_records(tmp_path: Path) -> None:
    old: dict[str, Any] = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    record = StepRecord(**old, num_tokens=1, num_loss_tokens=1, wall_s=0.1)
    assert pickle.loads(pickle.dumps(record)) == record
    assert record.mfu is record.tokens_per_s is record.peak_memory_bytes is None
