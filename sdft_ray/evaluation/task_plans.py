"""What names stand for: tasks and groups with all their fields, from a folder of task files and from lm-eval's own.

The rules are those of lm-eval's `TaskManager` (0.4.13): groups override fields of their members, and a tag stands for
every task that bears it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.task_files import Field, Fields, Origin, TaskFile, TaskFolder, fields_of, own_tasks

_GROUP_FIELDS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata"}
"""lm-eval's `GroupConfig`; all other fields of a group's file override those of its members."""
_NO_TASK_FIELDS = ("include", "tag", "group", "task_list")


@dataclass(frozen=True)
class TaskPlan:
    """One task, its fields with every override, and the task files behind them, its own first."""

    name: str
    fields: Fields
    files: tuple[Path, ...]

    def value(self, name: str) -> Any:
        return self.fields[name].value if name in self.fields else None

    def with_values(self, folder: Path, **values: Any) -> TaskPlan:
        """With other values for some fields."""
        return TaskPlan(self.name, {**self.fields, **fields_of(values, folder)}, self.files)


@dataclass(frozen=True)
class GroupPlan:
    """A group: its own fields, its members, and the task file that defines it."""

    name: str
    fields: Fields
    members: tuple[Plan, ...]
    files: tuple[Path, ...]


Plan = TaskPlan | GroupPlan


@dataclass(frozen=True)
class TaskPlaces:
    """Where tasks and their data lie: a folder of task files, a folder of data sets, and where other paths start."""

    include: Path | None = None
    data: Path | None = None
    working_dir: Path | None = None
    """None: the working directory of this process."""

    def library(self) -> TaskLibrary:
        """Raises `EvaluationError` for a folder of task files that does not exist or has none."""
        return TaskLibrary(None if self.include is None else _task_folder(self.include))

    @property
    def origin(self) -> Origin:
        return Origin.of(self.include, self.working_dir or Path.cwd())


def _task_folder(include: Path) -> TaskFolder:
    root = Path(os.path.abspath(include))
    if not root.is_dir():
        raise EvaluationError(f"the task folder {include} does not exist", "name a folder with lm-eval YAML files")
    folder = TaskFolder(root)
    if not folder.paths:
        raise EvaluationError(f"the task folder {include} has no .yaml file", "put lm-eval task files into it")
    return folder


# --- what names stand for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskLibrary:
    """The names of a folder of task files, which hide those of lm-eval, and lm-eval's own."""

    folder: TaskFolder | None = None

    def in_folder(self, name: str) -> bool:
        """Whether the folder defines a name. Raises `EvaluationError` for a file that may do so and cannot be read."""
        if self.folder is None:
            return False
        found = self.folder.find(name) is not None
        if not found:
            self.folder.check_readable(name)
        return found

    def plans(self, names: Sequence[str]) -> dict[str, tuple[Plan, ...]]:
        """What each name stands for: a task or group for itself, a tag for its tasks.

        Raises `EvaluationError` for an unknown name (with the nearest ones), for a file that cannot be read, and for a
        task that two names stand for.
        """
        if not names:
            raise EvaluationError("no tasks are given", "name at least one lm-eval task")
        plans = {name: tuple(self._plan(name, {}, ())) for name in names}
        owner: dict[str, str] = {}
        for name, parts in plans.items():
            for task in tasks_of(parts):
                if owner.setdefault(task.name, name) != name:
                    raise EvaluationError(
                        f"task {task.name!r} is asked for twice, by {owner[task.name]!r} and by {name!r}",
                        "leave one of the two out",
                    )
        return plans

    def _plan(self, name: str, overrides: Fields, above: tuple[str, ...]) -> Iterator[Plan]:
        found = self._find(name)
        if found is None:
            raise self._unknown(name)
        if isinstance(found, tuple):
            yield from (self._task(file, overrides) for file in found)
        elif found.kind == "group" and "class" not in found.fields:
            yield self._group(name, found.fields, overrides, found.files, above)
        else:
            yield self._task(found, overrides)

    def _find(self, name: str) -> TaskFile | tuple[TaskFile, ...] | None:
        if self.folder is not None and self.in_folder(name):
            return self.folder.find(name)
        return own_tasks().find(name)

    def _task(self, file: TaskFile, overrides: Fields) -> TaskPlan:
        name = str(file.value("task"))
        return _task_plan(name, {**file.fields, **overrides}, file.files)

    def _group(
        self, name: str, fields: Fields, overrides: Fields, files: tuple[Path, ...], above: tuple[str, ...]
    ) -> GroupPlan:
        if name in above:
            raise EvaluationError(f"group {name!r} contains itself", f"correct {files[0]}")
        above = (*above, name)
        common = {**{key: part for key, part in fields.items() if key not in _GROUP_FIELDS}, **overrides}
        listed = fields["task"] if "task" in fields else Field((), files[0].parent)
        members: list[Plan] = []
        for item in [listed.value] if isinstance(listed.value, str) else listed.value:
            members += self._member(item, name, common, listed.folder, files, above)
        own = {key: part for key, part in fields.items() if key in _GROUP_FIELDS}
        return GroupPlan(name, own, tuple(members), files)

    def _member(
        self, item: Any, group: str, common: Fields, folder: Path, files: tuple[Path, ...], above: tuple[str, ...]
    ) -> Iterator[Plan]:
        """A name, a name with overrides, or a task or group written out in its group's file, as lm-eval reads them."""
        if isinstance(item, str):
            yield from self._plan(item, common, above)
            return
        kind = next((kind for kind in ("group", "task") if isinstance(item, dict) and kind in item), None)
        if kind is None:
            raise EvaluationError(f"{files[0]}: {item!r} in group {group!r} names no task", "give task: or group:")
        own = fields_of({key: value for key, value in item.items() if key != kind}, folder)
        name = item[kind]
        if self._find(name) is not None:
            yield from (_with_files(plan, files) for plan in self._plan(name, {**common, **own}, above))
        elif kind == "group":
            yield self._group(f"{group}::{name}", own, common, files, above)
        elif {"dataset_path", "custom_dataset"} & {*own, *common}:
            yield _task_plan(f"{group}::{name}", {**common, **own}, files)
        else:
            raise self._unknown(name)

    def _unknown(self, name: str) -> EvaluationError:
        if self.folder is not None:
            self.folder.check_readable(None)
            named = next((path for path in self.folder.paths if path.stem == name), None)
            file = self.folder.parsed(named) if named else None
            if file is not None and file.kind is not None:
                other = file.value(file.kind)
                return EvaluationError(f"no task named {name!r}: {file.path} defines {other!r}", f"ask for {other}")
        known = [*(self.folder.names() if self.folder else ()), *own_tasks().names()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks` for the names"
        return EvaluationError(f"no task named {name!r}", hint)


def _task_plan(name: str, fields: Fields, files: tuple[Path, ...]) -> TaskPlan:
    kept = {key: part for key, part in fields.items() if key not in _NO_TASK_FIELDS}
    return TaskPlan(name, {**kept, "task": Field(name, files[0].parent)}, files)


def _with_files(plan: Plan, files: tuple[Path, ...]) -> Plan:
    """Overrides come from another file."""
    if isinstance(plan, GroupPlan):
        return plan
    return TaskPlan(plan.name, plan.fields, tuple(dict.fromkeys((*plan.files, *files))))


def tasks_of(plans: Sequence[Plan]) -> Iterator[TaskPlan]:
    """The tasks themselves, groups taken apart."""
    for plan in plans:
        if isinstance(plan, GroupPlan):
            yield from tasks_of(plan.members)
        else:
            yield plan


def files_of(plans: Sequence[Plan]) -> Iterator[Path]:
    """The task files behind plans."""
    for plan in plans:
        yield from plan.files
        if isinstance(plan, GroupPlan):
            yield from files_of(plan.members)
