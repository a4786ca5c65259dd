"""lm-eval task files as they are on disk: fields, includes, functions, and the names that they define.

Nothing of lm-eval is imported here, so that an identity costs no start-up. The rules are those of lm-eval's
`TaskManager` (0.4.13): `include` fills in fields, a tag stands for every task that bears it. Relative paths start at
the file that names them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sdft_ray.errors import EvaluationError

ORIGIN = ".origin.json"
"""At the root of a tree of files that were carried from elsewhere: where their paths began."""

_HIDDEN = {"__pycache__", ".ipynb_checkpoints"}
_UNREADABLE = (yaml.YAMLError, ValueError, OSError)


@dataclass(frozen=True)
class Function:
    """A `!function` of a task file: `name` in the file `path`, or in the installed module `module` if that is None."""

    module: str
    name: str
    path: Path | None


@dataclass(frozen=True)
class Field:
    """The value of a field, and the folder of the file that sets it."""

    value: Any
    folder: Path


Fields = Mapping[str, Field]


@dataclass(frozen=True)
class TaskFile:
    """A task file with what it includes; `files` are itself and those."""

    fields: Fields
    files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.files[0]

    @property
    def kind(self) -> str | None:
        """The field that gives the file its name; None for files that only others include."""
        return next((kind for kind in ("group", "task") if isinstance(self.value(kind), str)), None)

    @property
    def tags(self) -> set[str]:
        tags = self.value("tag") if self.kind == "task" else None
        return {tags} if isinstance(tags, str) else set(tags or ())

    def value(self, name: str) -> Any:
        return self.fields[name].value if name in self.fields else None


# --- from paths as written to files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where written paths lead: here, or into the tree to which the files were carried."""

    working_dir: Path
    root: Path | None = None
    """The tree; None where nothing was carried."""

    @classmethod
    def of(cls, include: Path | None, working_dir: Path) -> Origin:
        """From the note at the root of a carried tree, if the folder lies in one."""
        for root in Path(os.path.abspath(include)).parents if include else ():
            if (root / ORIGIN).is_file():
                note = json.loads((root / ORIGIN).read_text(encoding="utf-8"))
                return cls(Path(note["working_dir"]), root)
        return cls(working_dir)

    def carried(self, path: Path) -> Path:
        """Where an absolute path of the machine of origin lies here."""
        inside = None if self.root is None else self.root / path.relative_to(path.anchor)
        return inside if inside is not None and inside.exists() else path

    def candidates(self, written: str, folders: Sequence[Path]) -> list[Path]:
        """Where a path may lead, the likeliest first: below `folders`, then below the working directory."""
        path = Path(os.path.expanduser(written))
        if path.is_absolute():
            return [self.carried(path)]
        below = [*folders, self.carried(self.working_dir)]
        return [Path(os.path.normpath(folder / path)) for folder in dict.fromkeys(below)]


# --- one file -------------------------------------------------------------------------------------------------


def read_task_file(path: Path, origin: Origin | None = None, _above: tuple[Path, ...] = ()) -> TaskFile:
    """A task file with its includes. Raises `ValueError`, `OSError` or `yaml.YAMLError` for what cannot be read."""
    path = Path(os.path.abspath(path))
    if path in _above:
        raise ValueError(f"{path} includes itself")
    config = yaml.load(path.read_bytes(), Loader=_loader(path.parent))  # noqa: S506 - a child of the safe loader
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no mapping")
    includes = config.pop("include", ())
    fields: dict[str, Field] = {}
    files = [path]
    for written in [includes] if isinstance(includes, str) else includes:
        target = path.parent / written
        if origin is not None and Path(written).is_absolute():
            target = origin.carried(Path(written))
        included = read_task_file(target, origin, (*_above, path))
        fields |= {name: part for name, part in included.fields.items() if name != "task_list"}
        files += included.files
    return TaskFile({**fields, **fields_of(config, path.parent)}, tuple(dict.fromkeys(files)))


def fields_of(values: Mapping[str, Any], folder: Path) -> dict[str, Field]:
    return {name: Field(value, folder) for name, value in values.items()}


@lru_cache(maxsize=4096)
def _loader(folder: Path) -> type[Any]:
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base): ...

    def function(loader: Any, node: yaml.ScalarNode) -> Function:
        module, _, name = loader.construct_scalar(node).rpartition(".")
        path = folder / f"{module.replace('.', '/')}.py"
        return Function(module, name, path if path.exists() else None)

    Loader.add_constructor("!function", function)
    return Loader


def functions_in(value: Any) -> Iterator[Function]:
    """All functions anywhere in a value."""
    if isinstance(value, Function):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from functions_in(part)


# --- all files of a folder --------------------------------------------------------------------------------------


@dataclass
class TaskFolder:
    """Task files below a folder by name. `is_large`: only files that mention a name are parsed when it is looked for.

    Files that cannot be read count only for names that they mention. `broken` has them with the reason.
    """

    root: Path
    is_large: bool = False
    broken: dict[Path, str] = field(default_factory=dict)
    _parsed: dict[Path, TaskFile | None] = field(default_factory=dict)

    @cached_property
    def words(self) -> dict[Path, set[str]]:
        """The words of every file that may hold fields, included ones too; a path's last part is a word as well."""
        found = {}
        for path in sorted(self.root.glob("**/*yaml" if self.is_large else "**/*.yaml")):
            if not _HIDDEN.isdisjoint(path.parts) or not path.is_file():
                continue
            words = set(re.findall(r"[^\s\"'\[\]{},]+", path.read_text(encoding="utf-8", errors="replace")))
            found[path] = words | {word.rstrip(":") for word in words} | {word.rpartition("/")[2] for word in words}
        return found

    @property
    def paths(self) -> list[Path]:
        """Files that may define a task, a group or a tag."""
        return [path for path in self.words if path.suffix == ".yaml"]

    def find(self, name: str) -> TaskFile | tuple[TaskFile, ...] | None:
        """The task or group of that name, else the tasks with that tag, by name; None for a name that nothing has."""
        parsed = [file for path in self._candidates(name) if (file := self.parsed(path)) is not None]
        named = [file for file in parsed if file.kind and file.value(file.kind) == name]
        if len(named) > 1 and not self.is_large:
            raise EvaluationError(
                f"the task files {named[0].path} and {named[1].path} both define {name!r}", "remove or rename one"
            )
        if named:
            return named[0]
        tagged: dict[str, TaskFile] = {}
        for file in parsed:
            if name in file.tags:
                tagged.setdefault(file.value("task"), file)
        return tuple(tagged[task] for task in sorted(tagged)) or None

    def check_readable(self, name: str | None) -> None:
        """Raise `EvaluationError` for a file that cannot be read and mentions `name`; None: for any."""
        for path, reason in self.broken.items():
            if name is None or name in self.words[path]:
                raise EvaluationError(f"the task file {path} cannot be read: {reason}", "correct or remove it")

    def names(self) -> list[str]:
        """What can be asked for, near enough for a hint."""
        if self.is_large:
            pattern = re.compile(r"^[\"']?(?:task|group)[\"']?:\s*[\"']?([^\s\"'\[#]+)", re.MULTILINE)
            return [name for path in self.paths for name in pattern.findall(path.read_text(encoding="utf-8"))]
        files = [file for path in self.paths if (file := self.parsed(path)) is not None and file.kind]
        return [name for file in files for name in (str(file.value(str(file.kind))), *sorted(file.tags))]

    def _candidates(self, name: str) -> list[Path]:
        if not self.is_large:
            return self.paths
        wanted, found = {name}, set()
        while new := {path for word in wanted for path in self._mentions.get(word, ())} - found:
            found |= new
            wanted = {path.name for path in new}  # whoever includes one of these has its tags
        return sorted(path for path in found if path.suffix == ".yaml")

    @cached_property
    def _mentions(self) -> dict[str, list[Path]]:
        mentions: dict[str, list[Path]] = {}
        for path, words in self.words.items():
            for word in words:
                mentions.setdefault(word, []).append(path)
        return mentions

    def parsed(self, path: Path) -> TaskFile | None:
        """A file of the folder; None, and an entry in `broken`, for one that cannot be read."""
        if path not in self._parsed:
            try:
                self._parsed[path] = read_task_file(path, Origin.of(self.root, self.root))
            except _UNREADABLE as error:
                self._parsed[path] = None
                self.broken[path] = " ".join(str(error).split())[:300]
        return self._parsed[path]


@lru_cache(maxsize=1)
def own_tasks() -> TaskFolder:
    """lm-eval's own task files. Raises `EvaluationError` where it is not installed."""
    root = own_root()
    if root is None:
        raise EvaluationError("lm-eval is not installed", "install sdft_ray[eval]")
    return TaskFolder(root, is_large=True)


@lru_cache(maxsize=1)
def own_root() -> Path | None:
    """The folder of lm-eval's own task files; None where it is not installed."""
    spec = find_spec("lm_eval")
    return Path(spec.origin).parent / "tasks" if spec is not None and spec.origin is not None else None


def is_own(path: Path) -> bool:
    """Whether a file or folder is lm-eval's own."""
    root = own_root()
    return root is not None and path.is_relative_to(root)
