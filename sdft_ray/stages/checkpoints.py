"""Checkpoints of a training run on Ray Train: written while training goes on, and taken up only when whole.

A worker writes the state into a folder of its own, and Ray Train copies it to the run's storage in the background.
Which one a run goes on from is found out here, by the digest in each, and not taken from Ray's list of them: a copy
that was cut short, or damaged later, is passed over for the one before.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from sdft_ray.errors import StoreError
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.training.state import TrainState

RUN_NAME = "attempts"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_SAVING = "saving-"

History = list[dict[str, Any]]


@dataclass
class Resumed:
    """Where a run goes on: nothing to go on from is a state of None. `damaged` names what was passed over."""

    state: TrainState | None
    history: History
    damaged: tuple[str, ...] = ()

    def take(self) -> TrainState | None:
        """The state, which is not held here any longer: it is as large as weights and optimizer together."""
        state, self.state = self.state, None
        return state


def resume(job: StageContext, share: tuple[int, int]) -> Resumed:
    """State and history of the newest whole checkpoint of a run; rank 0 chooses. Every rank calls this.

    `share` is which share of each weight this rank holds, of how many. What a killed worker had begun to write is
    removed.
    """
    from sdft_ray.training.state import load_state

    context = ray.train.get_context()
    if context.get_local_rank() == 0:  # before anyone saves: all wait for rank 0 below
        for unfinished in job.work().glob(f"{_SAVING}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    is_first = context.get_world_rank() == 0
    told: Any = broadcast_from_rank_zero(_newest_whole(job.store.work_url(job.address)) if is_first else None)
    chosen, damaged = told
    if chosen is None:
        return Resumed(None, [], damaged)
    with Checkpoint(chosen).as_directory() as directory:
        state = load_state(Path(directory), rank=share[0], world_size=share[1], checked=True)
        return Resumed(state, _history(Path(directory)), damaged)


def save(job: StageContext, state: TrainState, history: History | None) -> str:
    """Report a checkpoint. Why it could not be written, or "".

    Ranks beyond the first have no history; those that hold no part of their own report nothing but take part. Ray puts
    the files of all ranks into one checkpoint. A full disk costs the checkpoint, not the run: training goes on, and
    what was saved before stays good.
    """
    from sdft_ray.training.state import save_state

    if history is None and state.part is None:
        ray.train.report({}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return ""
    directory: Path | None = None
    try:
        directory = Path(tempfile.mkdtemp(prefix=_SAVING, dir=job.work()))
        save_state(directory, state)
        if history is not None:
            text = "".join(json.dumps(record) + "\n" for record in history)
            (directory / files.HISTORY).write_text(text, encoding="utf-8")
        _check_room(job, directory)
    except Exception as reason:  # safetensors has an error of its own for whatever the system refuses
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        if not _is_full(reason):
            raise
        ray.train.report({}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return (
            f"no disk space for the checkpoint of step {state.step}; the one before it is kept: free some space, and"
            " the next one will be written"
        )
    ray.train.report(
        {"step": state.step},
        checkpoint=Checkpoint.from_directory(str(directory)),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
    return ""


def repair_checkpoint_index(storage: str) -> None:
    """Remove Ray's list of a run's checkpoints where it is cut short or names one that is gone.

    Ray would refuse to start over it. The checkpoints themselves are found without it.
    """
    filesystem, root = fsspec.core.url_to_fs(storage)
    path = f"{root}/{RUN_NAME}/{_SNAPSHOT}"
    if not filesystem.exists(path):
        return
    try:
        told = json.loads(filesystem.cat_file(path))
        names = [result["checkpoint_dir_name"] for result in told["checkpoint_results"]]
        whole = all(filesystem.exists(f"{root}/{RUN_NAME}/{name}") for name in names)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        filesystem.rm_file(path)


def _newest_whole(storage: str) -> tuple[str | None, tuple[str, ...]]:
    """Where the newest checkpoint lies whose every byte is there, and what is wrong with those newer than it."""
    from sdft_ray.training.state import check_state

    filesystem, root = fsspec.core.url_to_fs(storage)
    found = [str(path).rsplit("/", 1)[-1] for path in filesystem.glob(f"{root}/{RUN_NAME}/checkpoint_*/")]
    damaged: list[str] = []
    for name in sorted((name for name in found if not name.endswith(".json")), reverse=True):  # named by the time
        place = f"{storage}/{RUN_NAME}/{name}"
        try:
            with Checkpoint(place).as_directory() as directory:
                step = check_state(Path(directory))
                if len(_history(Path(directory))) != step:
                    raise StoreError(f"its history does not have {step} steps")
                return place, tuple(damaged)
        except StoreError as reason:
            damaged.append(f"{name}: {reason.message}")
    return None, tuple(damaged)


def _history(directory: Path) -> History:
    """Raises `StoreError` when it was not copied whole."""
    try:
        text = (directory / files.HISTORY).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as reason:
        raise StoreError(f"its history cannot be read: {reason}") from reason


def _check_room(job: StageContext, directory: Path) -> None:
    """Ray copies the checkpoint in the background, where a full disk would end the run. Raises `OSError`."""
    needed = sum(path.stat().st_size for path in directory.iterdir())
    if job.store.is_local and shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _is_full(reason: BaseException) -> bool:
    return getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(reason)
