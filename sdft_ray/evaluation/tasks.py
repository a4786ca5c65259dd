"""lm-eval tasks by name: its own, and those of a folder of YAML files with their data beside them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from sdft_ray.data.decontamination import MIN_WORDS, words
from sdft_ray.errors import EvaluationError

_CANNOT_LOAD = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ImportError,
    TemplateError,
    DatasetsError,
)
"""What lm-eval and datasets raise for a task file or data that is not as it should be."""

_NOT_HERE = (ConnectionError, DatasetNotFoundError)
"""What they raise when data of the hub cannot be had."""


class FolderTaskManager(TaskManager):
    """lm-eval's task manager over a folder in which `data_files` are relative to their YAML file.

    lm-eval itself takes them relative to the working directory, which a task folder cannot know.
    """

    def __init__(self, folder: Path, *, include_defaults: bool) -> None:
        """Index the folder, and lm-eval's own tasks too if asked, which takes ten seconds."""
        super().__init__(include_path=folder, include_defaults=include_defaults)
        for name, entry in list(self.task_index.items()):
            if entry.yaml_path is not None and folder in Path(entry.yaml_path).parents and entry.kind is Kind.TASK:
                config = load_yaml(entry.yaml_path, resolve_func=True)
                if _make_absolute(config, Path(entry.yaml_path)):
                    # Without a path lm-eval builds the task from the config given here.
                    self.task_index[name] = Entry(name, entry.kind, None, config, entry.tags)


def _make_absolute(config: dict[str, Any], yaml_path: Path) -> bool:
    """Resolve the data files of a task config in place; False when it has none. Raises `EvaluationError`."""
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict) or "data_files" not in kwargs:
        return False

    def resolve(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: resolve(part) for split, part in files.items()}
        if isinstance(files, (list, tuple)):
            return [resolve(part) for part in files]
        if "://" in files:
            return files
        path = yaml_path.parent / files
        if not path.exists() and not any(char in files for char in "*?["):
            raise EvaluationError(f"{yaml_path}: data file {files} does not exist", f"expected it at {path}")
        return str(path)

    config["dataset_kwargs"] = {**kwargs, "data_files": resolve(kwargs["data_files"])}
    return True


def load_tasks(names: Sequence[str], include: str | Path | None) -> dict[str, list[Task | Group]]:
    """What each name stands for, with its data.

    A task or group stands for itself, a tag for its tasks. A name in the folder `include` hides lm-eval's
    task of the same name. Raises `EvaluationError` for an unknown name (with the nearest ones), a folder
    without task files, a task file that cannot be read, and missing data.
    """
    manager = _manager(names, include)
    loaded: dict[str, list[Task | Group]] = {}
    for name in names:
        try:
            found = manager.load([name])
        except _CANNOT_LOAD as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, _NOT_HERE):
                raise EvaluationError(
                    f"the data of task {name!r} is not in the Hugging Face cache and cannot be downloaded: {reason}",
                    "download it on a machine with a network and copy the cache (HF_HOME), or use local files in task "
                    "files of your own (evaluate.include)",
                ) from error
            raise EvaluationError(
                f"task {name!r} cannot be loaded: {reason}",
                "check the task file, and that its data can be downloaded from here",
            ) from error
        groups = found.get("groups", {})
        loaded[name] = [groups[name]] if name in groups else list(found["tasks"].values())
    return loaded


def leaf_tasks(loaded: Sequence[Task | Group]) -> list[Task]:
    """The tasks themselves, groups taken apart."""
    return [task for part in loaded for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]


def task_questions(names: Sequence[str], include: str | Path | None) -> Iterator[tuple[str, ...]]:
    """What the models are asked: the texts of every document that the tasks are scored on, one after the other.

    All documents count, whatever limit an evaluation has; few-shot examples do not. Raises as `load_tasks` does.
    """
    for parts in load_tasks(names, include).values():
        for task in leaf_tasks(parts):
            for doc in task.eval_docs:
                yield _question(task, doc)


def _question(task: Any, doc: Any) -> tuple[str, ...]:
    """The fields of a document that its question shows, and the one that the task itself names for this use.

    The rendered question holds the template's words too, in some tasks whole worked examples (TruthfulQA), which
    are nobody's test question. It counts only where no field is long enough to be looked for.
    """
    shown, options = task.doc_to_text(doc), ()
    if not isinstance(shown, str):  # the number of an option, and the options are the questions (WinoGrande)
        shown, options = "", tuple(map(str, task.doc_to_choice(doc)))
    named = task.get_config("doc_to_decontamination_query")
    fields = {name: text for name, text in doc.items() if isinstance(text, str) and text.strip()}
    asked = (text for name, text in fields.items() if name == named or text.strip() in shown)
    texts = (*options, *asked)
    return texts if any(len(words(text)) >= MIN_WORDS for text in texts) else (*texts, shown)


def check_names(names: Sequence[str], include: str | Path | None) -> None:
    """Raise `EvaluationError` for a name that neither the folder `include` nor lm-eval knows; loads no data."""
    _manager(names, include)


def _manager(names: Sequence[str], include: str | Path | None) -> TaskManager:
    if not names:
        raise EvaluationError("no tasks are given", "name at least one lm-eval task")
    folder = _task_folder(include) if include is not None else None
    if folder is not None:
        manager = FolderTaskManager(folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
        _check_readable(folder)
        manager = FolderTaskManager(folder, include_defaults=True)
    else:
        manager = TaskManager()
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks` for the names"
        raise EvaluationError(f"no task named {unknown[0]!r}", hint)
    return manager


def _task_folder(include: str | Path) -> Path:
    folder = Path(include).resolve()
    if not folder.is_dir():
        raise EvaluationError(f"the task folder {include} does not exist", "name a folder with lm-eval YAML files")
    if not any(folder.glob("**/*.yaml")):
        raise EvaluationError(f"the task folder {include} has no .yaml file", "put lm-eval task files into it")
    return folder


def _check_readable(folder: Path) -> None:
    """lm-eval skips a task file that it cannot parse without a word; a missing task is then a puzzle."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EvaluationError(f"the task file {path} cannot be read: {reason}", "correct or remove it") from error
