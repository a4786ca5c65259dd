"""The data files of lm-eval tasks: where task files name them, and where a folder of data sets holds those of the hub.

The folder (`evaluate.data` in a recipe) has one folder for each data set and in it one file for each split. For the
configuration `C` of the data set `owner/name`, which a task `t` reads, these are tried in this order:

    owner/name/C   owner/name   name/C   name   C   t   t without digits at its end

Capitals do not count, and `-` and `.` count as `_`: `ARC-Challenge` is `arc_challenge`. A folder that is named after
the data set alone serves the configurations `main` and `default`, and others if a column of its rows holds the name
of the configuration (MMLU's `subject`): then the rows that have it are taken. A split is `SPLIT.jsonl`, `.json` or
`.parquet` (the first two also gzipped), or several files `SPLIT-00000-of-00002.parquet`, in that folder or in `data/`
below it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.task_files import Origin
from sdft_ray.evaluation.task_plans import TaskPlaces, TaskPlan
from sdft_ray.store.fingerprint import listed_files

BUILDERS = {
    "json", "csv", "parquet", "arrow", "text", "xml", "pandas", "webdataset", "imagefolder", "audiofolder",
    "videofolder", "hdf5", "lance", "pdffolder", "niftifolder", "eval", "spark", "sql", "cache",
}  # fmt: skip
"""What `dataset_path` may name that is no data set but a way to read files (`datasets`' packaged modules)."""

_SPLIT_FILE = re.compile(r"(?P<split>[\w.\-]+?)(-\d{5}-of-\d{5})?\.(?P<kind>jsonl|json|parquet)(\.gz)?")
_PLAIN = {"", "main", "default"}
"""Configurations that need no folder of their own."""
_CONFIG_CHARS = 100
"""No configuration has a longer name."""


# --- files that task files name -----------------------------------------------------------------------------------


def with_local_files(task: TaskPlan, origin: Origin) -> tuple[TaskPlan, tuple[Path, ...]]:
    """The task with the absolute paths of its local data, and those files; unchanged where it has none.

    Relative paths start at the file that names them, else at the task's own file, else at the working directory. Raises
    `EvaluationError` for a file or folder that does not exist.
    """
    path, kwargs = task.value("dataset_path"), task.value("dataset_kwargs") or {}
    if not isinstance(path, str) or not isinstance(kwargs, dict) or "://" in path:
        return task, ()
    if path not in BUILDERS:
        found = next((place for place in _places(task, "dataset_path", path, origin) if place.exists()), None)
        if found is None:
            return task, ()  # a data set of the hub, and its files are there
        task = task.with_values(found.parent, dataset_path=str(found))
        if found.is_file() or "data_files" not in kwargs:
            return task, tuple(listed_files(found)) if found.is_dir() else (found,)
        files = _resolved(kwargs["data_files"], lambda written: _match(task, written, [found / written]))
        return _with_files(task, kwargs, files)
    folder = None
    if isinstance(kwargs.get("data_dir"), str) and "://" not in kwargs["data_dir"]:
        folder = _existing(task, kwargs["data_dir"], _places(task, "dataset_kwargs", kwargs["data_dir"], origin))
        kwargs = {**kwargs, "data_dir": str(folder)}
        task = task.with_values(folder, dataset_kwargs=kwargs)
    if "data_files" not in kwargs:
        return task, tuple(listed_files(folder)) if folder else ()

    def match(written: str) -> list[str]:
        places = _places(task, "dataset_kwargs", written, origin)
        return _match(task, written, [folder / written, *places] if folder else places)

    files = _resolved(kwargs["data_files"], match)
    return _with_files(task, {key: value for key, value in kwargs.items() if key != "data_dir"}, files)


def _with_files(task: TaskPlan, kwargs: Mapping[str, Any], files: Any) -> tuple[TaskPlan, tuple[Path, ...]]:
    changed = task.with_values(task.files[0].parent, dataset_kwargs={**kwargs, "data_files": files})
    return changed, tuple(Path(name) for name in _flat(files) if "://" not in name)


def _places(task: TaskPlan, field: str, written: str, origin: Origin) -> list[Path]:
    return origin.candidates(written, [task.fields[field].folder, task.files[0].parent])


def _resolved(files: Any, match: Any) -> Any:
    """Every name in what `datasets` takes as `data_files`, in its form."""
    if isinstance(files, Mapping):
        return {split: _resolved(part, match) for split, part in files.items()}
    if isinstance(files, list | tuple):
        return [name for part in files for name in _resolved(part, match)]
    return [files] if "://" in files or "::" in files else match(files)


def _flat(files: Any) -> Iterator[str]:
    for part in files.values() if isinstance(files, Mapping) else files:
        if isinstance(part, str):
            yield part
        else:
            yield from _flat(part)


def _match(task: TaskPlan, written: str, places: Sequence[Path]) -> list[str]:
    """The files that a name or a pattern stands for, sorted."""
    for place in places:
        if place.is_file():
            return [str(place)]
        if any(char in written for char in "*?["):
            import fsspec

            found = [str(name) for name in fsspec.filesystem("file").glob(str(place)) if Path(name).is_file()]
            visible = sorted(name for name in found if not Path(name).name.startswith((".", "__")))
            if visible:
                return visible
    raise _missing(task, written, places)


def _existing(task: TaskPlan, written: str, places: Sequence[Path]) -> Path:
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise _missing(task, written, places)
    return found


def _missing(task: TaskPlan, written: str, places: Sequence[Path]) -> EvaluationError:
    where = " or ".join(str(place) for place in dict.fromkeys(places))
    return EvaluationError(f"{task.files[0]}: data file {written} does not exist", f"expected it at {where}")


def is_local(task: TaskPlan, places: TaskPlaces) -> bool:
    """Whether the data of a task is here: files that it names, or a folder of data sets."""
    if places.data is not None:
        return True
    if {"class", "custom_dataset"} & {name for name in task.fields if task.value(name) is not None}:
        return False  # code of its own, which may fetch anything
    return bool(with_local_files(task, places.origin)[1]) or not isinstance(task.value("dataset_path"), str)


# --- files of a folder of data sets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubData:
    """The local files of a data set of the hub, by the splits that a task needs; of the rows those of one subset."""

    splits: dict[str, tuple[Path, ...]]
    subset: str | None
    """Rows count that hold this text in some column; None: all."""

    @property
    def files(self) -> Iterator[Path]:
        for paths in self.splits.values():
            yield from paths


def hub_data(task: TaskPlan, folder: Path, num_fewshot: int | None) -> HubData | None:
    """Where `folder` holds the data of a task; None for a task whose data is not of the hub.

    Only splits that are needed count: the one that is scored, and with few-shot examples the one that they come from.
    Raises `EvaluationError` for data and splits that the folder does not have.
    """
    path = task.value("dataset_path")
    if "class" in task.fields:
        raise EvaluationError(
            f"task {task.name!r} loads its data by code of its own, which cannot read it from {folder}",
            "leave the task out, or leave evaluate.data out",
        )
    if (
        task.value("custom_dataset") is not None
        or not isinstance(path, str)
        or "://" in path
        or Path(path).is_absolute()
    ):
        return None
    if path in BUILDERS and _has_local_files(task):
        return None
    config = str(task.value("dataset_name") or "")
    wanted = _needed_splits(task, num_fewshot)
    found = _dataset_folder(task, folder, path, config)
    if found is None:
        name = f"{path}/{config}" if config else path
        raise EvaluationError(
            f"task {task.name!r} reads the data set {name}, which {folder} does not hold",
            f"put its splits ({', '.join(wanted)}) there: {name}/{next(iter(wanted))}.jsonl or .parquet",
        )
    place, is_whole = found
    files = split_files(place)
    for split, use in wanted.items():
        if split not in files:
            raise EvaluationError(
                f"task {task.name!r} needs the split {split!r} of {path} {use}, and {place} has "
                f"{', '.join(sorted(files)) or 'none'}",
                f"add {split}.jsonl or {split}.parquet"
                + (", or set num_fewshot: 0 for the task" if use == _FOR_SHOTS else ""),
            )
    return HubData({split: files[split] for split in wanted}, config if is_whole else None)


_TO_SCORE, _FOR_SHOTS = "to score", "for few-shot examples"


def _needed_splits(task: TaskPlan, num_fewshot: int | None) -> dict[str, str]:
    """What each split is needed for, as lm-eval chooses them."""
    scored = task.value("test_split") or task.value("validation_split")
    if scored is None:
        raise EvaluationError(f"task {task.name!r} has no split to score", f"correct {task.files[0]}")
    needed = {scored: _TO_SCORE}
    own = task.value("num_fewshot")
    shots = own if own == 0 or num_fewshot is None else num_fewshot  # a task that fixes 0 keeps it
    source = shots_split(task)
    if shots and source:
        needed.setdefault(source, _FOR_SHOTS)
    return needed


def shots_split(task: TaskPlan) -> str | None:
    """The split that few-shot examples come from; None where the task's file lists them."""
    config = task.value("fewshot_config") or {}
    if split := config.get("split") or task.value("fewshot_split"):
        return split
    if config.get("samples") is not None:
        return None
    return task.value("training_split") or task.value("validation_split") or task.value("test_split")


def _has_local_files(task: TaskPlan) -> bool:
    kwargs = task.value("dataset_kwargs") or {}
    named = kwargs.get("data_files", kwargs.get("data_dir", ()))
    return any("://" not in name for name in ([named] if isinstance(named, str) else _flat(named)))


def _dataset_folder(task: TaskPlan, folder: Path, path: str, config: str) -> tuple[Path, bool] | None:
    """The folder of a data set, and whether it holds other configurations too."""
    if not folder.is_dir():
        raise EvaluationError(f"the data folder {folder} does not exist", "check evaluate.data")
    shared = [] if path in BUILDERS else [path, path.rpartition("/")[2]]
    own = [] if config in _PLAIN else [config]
    own += [task.name, task.name.rstrip("0123456789")]
    for option in [part for name in shared for part in (f"{name}/{config}", name)] + own:
        for place in folders_below(folder, option):
            if not split_files(place):
                continue
            if config in _PLAIN or option not in shared or _plain(option) in map(_plain, own):
                return place, False
            if _holds(place, config):
                return place, True
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]+", "_", name.lower())


def folders_below(folder: Path, option: str) -> list[Path]:
    """Folders of that name, a part after the other, whatever capitals and hyphens they have."""
    places = [folder]
    for part in _plain(option).split("/"):
        places = [
            below
            for place in places
            for below in sorted(place.iterdir())
            if below.is_dir() and _plain(below.name) == part
        ]
    return places


def split_files(place: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each split in a folder. Raises `EvaluationError` for a split in more than one form."""
    splits: dict[str, list[Path]] = {}
    for below in (place, place / "data"):
        for file in sorted(below.iterdir()) if below.is_dir() and not splits else ():
            match = _SPLIT_FILE.fullmatch(file.name)
            if match and file.is_file():
                splits.setdefault(match["split"], []).append(file)
    for split, files in splits.items():
        if len(files) > 1 and not all("-of-" in file.name for file in files):
            raise EvaluationError(
                f"{place} holds the split {split!r} as {' and as '.join(file.name for file in files)}",
                "keep one of them",
            )
    return {split: tuple(files) for split, files in splits.items()}


def _holds(place: Path, config: str) -> bool:
    """Whether rows tell which configuration they belong to: in the first file some column holds its name."""
    file = next(iter(split_files(place).values()))[0]
    return config in _texts(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _texts(file: Path, mtime_ns: int) -> frozenset[str]:
    """Short texts that are the value of a column of its own, whatever the row."""
    del mtime_ns  # part of the key
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
    else:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            text = stream.read()
        rows = json.loads(text) if text.lstrip().startswith(b"[") else [json.loads(line) for line in text.splitlines()]
    values = (value for row in rows for value in row.values())
    return frozenset(value for value in values if isinstance(value, str) and len(value) <= _CONFIG_CHARS)


# --- rows ---------------------------------------------------------------------------------------------------------


def with_rows(task: TaskPlan, data: HubData) -> TaskPlan:
    """The task with rows of `data` in place of those of the hub, through lm-eval's own field for that."""
    changes: dict[str, Any] = {"custom_dataset": partial(_rows, data), "dataset_kwargs": None}
    for field in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if task.value(field) not in data.splits:
            changes[field] = None
    shots = task.value("fewshot_config")
    if shots and shots.get("split") not in data.splits:
        changes["fewshot_config"] = {key: value for key, value in shots.items() if key != "split"}
    return task.with_values(task.files[0].parent, **changes)


def _rows(data: HubData, **metadata: Any) -> dict[str, Any]:
    """Rows by split. lm-eval hands over the metadata of the task."""
    import numpy as np

    del metadata
    splits = {}
    for split, files in data.splits.items():
        rows = _table(files, tuple(file.stat().st_mtime_ns for file in files))
        if data.subset is not None:
            texts = [
                rows.data.column(name)
                for name in rows.column_names
                if getattr(rows.features[name], "dtype", "") == "string"
            ]
            found = [np.flatnonzero(column.to_numpy() == data.subset) for column in texts]
            rows = rows.select(max(found, key=len, default=[]))
        if not len(rows):
            of = f" of {data.subset}" if data.subset is not None else ""
            raise EvaluationError(
                f"the split {split!r} in {files[0].parent} has no rows{of}", "add them, or leave the task out"
            )
        splits[split] = rows
    return splits


@lru_cache(maxsize=16)
def _table(files: tuple[Path, ...], mtimes_ns: tuple[int, ...]) -> Any:
    from datasets import load_dataset

    del mtimes_ns  # part of the key
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=[str(file) for file in files], split="train")
