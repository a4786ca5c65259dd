"""Python modules of task files: what a `!function` stands for, and the files that its module reads."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.evaluation.task_files import Function, Origin, functions_in, is_own, own_root
from sdft_ray.evaluation.task_plans import TaskPlan

_MAX_PATH_CHARS = 300


def module_files(task: TaskPlan, origin: Origin) -> tuple[Path, ...]:
    """The modules of a task's functions, the modules and packages beside them that they import, and files they name.

    A file counts as named where a text of the module is its path, absolute or relative to the module's folder. Modules
    of lm-eval and installed ones do not count.
    """
    folders = _folders(task, origin)
    found: dict[Path, None] = {}
    left = [path for function in _functions(task) if (path := path_of(function, origin)) is not None]
    while left:
        path = left.pop(0)
        if path not in found and not is_own(path):
            found[path] = None
            if path.suffix == ".py":
                left += _read_by(path, folders)
    return tuple(found)


def _functions(task: TaskPlan) -> Iterator[Function]:
    for part in task.fields.values():
        yield from functions_in(part.value)


def path_of(function: Function, origin: Origin) -> Path | None:
    """The module's file; None for an installed module."""
    if function.path is not None:
        return function.path
    places = origin.candidates(f"{function.module.replace('.', '/')}.py", [])
    return next((place for place in places if place.is_file()), None)


def _folders(task: TaskPlan, origin: Origin) -> list[Path]:
    """Where modules of a task are imported from, apart from installed ones."""
    own = [path.parent for function in _functions(task) if (path := path_of(function, origin)) is not None]
    found = dict.fromkeys([*own, *(path.parent for path in task.files), origin.carried(origin.working_dir)])
    return [folder for folder in found if not is_own(folder)]


def _read_by(path: Path, folders: Sequence[Path]) -> list[Path]:
    """Files that a module imports or names, as far as its text tells. A module that cannot be parsed names none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += _named(path.parent, node.value)
            continue
        else:
            continue
        for name in names:
            found += next((files for folder in (path.parent, *folders) if (files := _modules(folder, name))), [])
    return found


def _modules(folder: Path, name: str) -> list[Path]:
    """The files behind `import a.b` in a folder: packages on the way, and the module; [] where it is not there."""
    found = []
    for part in name.split("."):
        if (folder / f"{part}.py").is_file():
            return [*found, folder / f"{part}.py"]
        if not (folder / part).is_dir():
            break
        folder = folder / part
        found += [path for path in [folder / "__init__.py"] if path.is_file()]
    return found


def _named(folder: Path, text: str) -> list[Path]:
    if not 1 < len(text) < _MAX_PATH_CHARS or "\n" in text or "\0" in text:
        return []
    path = folder / text
    with contextlib.suppress(OSError, RuntimeError):
        return [path] if path.is_file() else []
    return []


# --- from names to functions ------------------------------------------------------------------------------------


def with_functions(value: Any, origin: Origin) -> Any:
    """A copy of a value in which every `Function` is what it stands for. Raises `ImportError` or `AttributeError`."""
    if isinstance(value, Function):
        return _load(value, origin)
    if isinstance(value, Mapping):
        return {name: with_functions(part, origin) for name, part in value.items()}
    return [with_functions(part, origin) for part in value] if isinstance(value, list | tuple) else value


def _load(function: Function, origin: Origin) -> Any:
    path = path_of(function, origin)
    if path is None:
        module = importlib.import_module(function.module)
    elif is_own(path):
        parts = path.relative_to(own_root() or path).with_suffix("").parts
        module = importlib.import_module(".".join(("lm_eval", "tasks", *parts)))
    else:
        module = _module(path)
    return getattr(module, function.name)


def _module(path: Path) -> Any:
    """The module in a file. Its name tells its content, since `datasets` takes functions of one name as one."""
    name = f"task_{path.stem}_{hashlib.sha256(path.read_bytes() + str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python module")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextlib.contextmanager
def importable(tasks: Sequence[TaskPlan], origin: Origin) -> Iterator[None]:
    """Let modules of task files import those beside them; afterwards all of them are forgotten.

    A process evaluates for one recipe after another, and two folders may both have a `utils.py`.
    """
    files = {path for task in tasks for path in module_files(task, origin)}
    folders = list(dict.fromkeys(str(folder) for task in tasks for folder in _folders(task, origin))) if files else []
    before = set(sys.modules)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(os.path.abspath(file)) in files:
                del sys.modules[name]
