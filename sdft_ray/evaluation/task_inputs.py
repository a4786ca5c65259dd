"""Every file that tasks read: what their scores depend on, and what travels with a job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdft_ray.evaluation.task_data import hub_data, with_local_files
from sdft_ray.evaluation.task_files import is_own
from sdft_ray.evaluation.task_modules import module_files
from sdft_ray.evaluation.task_plans import TaskPlaces, files_of, tasks_of
from sdft_ray.store.fingerprint import listed_files


@dataclass(frozen=True)
class TaskInputs:
    """Files in the order in which tasks read them, each once.

    `outside` are those that do not count as part of the folder of task files; `data` those of the folder of data sets.
    """

    outside: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()


def task_inputs(shots: Mapping[str, int | None], places: TaskPlaces) -> TaskInputs:
    """The files that tasks read; `shots` maps the names asked for to their few-shot examples, as in `load_tasks`.

    lm-eval's own files do not count. Raises `EvaluationError` as `load_tasks` does for files that are not there.
    """
    library = places.library()
    names = [name for name in sorted(shots) if places.data is not None or library.in_folder(name)]
    if not names:
        return TaskInputs()
    outside: dict[Path, None] = {}
    data: dict[Path, None] = {}
    for name, parts in library.plans(names).items():
        outside |= dict.fromkeys(files_of(parts))
        for task in tasks_of(parts):
            outside |= dict.fromkeys(module_files(task, places.origin))
            task, files = with_local_files(task, places.origin)
            outside |= dict.fromkeys(files)
            if places.data is not None and (found := hub_data(task, places.data, shots[name])) is not None:
                data |= dict.fromkeys(found.files)
    inside = set(listed_files(_plain(places.include))) if places.include is not None else set()
    found = dict.fromkeys(map(_plain, outside))
    return TaskInputs(tuple(path for path in found if path not in inside and not is_own(path)), tuple(data))


def _plain(path: Path) -> Path:
    return Path(os.path.abspath(path))
