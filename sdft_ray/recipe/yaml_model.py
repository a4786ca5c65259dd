"""YAML to pydantic and back, with errors a person can act on. Shared by recipe and resources."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from sdft_ray.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads `1e-3` as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as `1e3`, which our loader would read as a number, and escapes Unicode's line breaks, which
    PyYAML folds to spaces.
    """

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _LINE_BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(str, _Dumper.represent_text)

_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(  # YAML 1.1 as PyYAML reads it wants a dot and a signed exponent
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_yaml(path: Path, error: type[UserError]) -> Any:
    """Parse a YAML file into plain data. Raises `error` with the line of the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise error(f"no file {path}", f"did you mean {near[0]}?" if near else "check the path") from None
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"cannot read {path}: {reason}", "give a readable UTF-8 YAML file") from None
    try:
        data = parse_yaml(text)
    except yaml.MarkedYAMLError as reason:
        mark = reason.problem_mark or reason.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise error(f"{path}{line}: {reason.problem or 'not YAML'}", "correct the YAML at that line") from None
    except ValueError as reason:  # a date that no calendar has
        raise error(f"{path}: {reason}", "put text values in quotes") from None
    if not isinstance(data, dict):
        raise error(f"{path} is not a YAML mapping of fields to values", "start from a file in jobs/recipes")
    return data


def parse_yaml(text: str) -> Any:
    """Plain data of a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


class RenamedFieldWarning(FutureWarning):
    """A file uses the old name of a field or value. It is read as before; identity does not change."""


class StrictPart(BaseModel):
    """Base of every part of a recipe or of resources: no unknown fields, no coercion, no change after construction.

    A field that was renamed keeps its old name as `serialization_alias`: input may use it, with a warning, and
    `canonical`, which identity is computed from, writes nothing else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, data: Any, info: ValidationInfo) -> Any:
        return _renamed(cls, data, silent=_is_stored(info.context)) if isinstance(data, dict) else data


STORED = {"stored": True}
"""Validation context for what an earlier version wrote: old names are read without a warning."""


def canonical(part: BaseModel, **options: Any) -> dict[str, Any]:
    """Plain data of a part as identity wants it: without defaults, renamed fields and values by their first name.

    `options` are those of `model_dump`, with the present names of fields.
    """
    return part.model_dump(mode="json", exclude_defaults=True, by_alias=True, **options)


def old_name(model: type[BaseModel], field: str) -> str:
    """What identity calls a field: its first name."""
    return model.model_fields[field].serialization_alias or field


def with_present_names(model: type[BaseModel], data: Any) -> Any:
    """Plain data of a model, not validated, with old names of fields replaced at every depth.

    Raises `ValueError` where both names of a field are given.
    """
    if isinstance(data, list | tuple):
        return tuple(with_present_names(model, item) for item in data)
    if not isinstance(data, dict):
        return data
    if not set(data) & {*model.model_fields, *old_names(model)}:  # names of the user's, such as those of arms
        return {name: with_present_names(model, value) for name, value in data.items()}
    renamed = _renamed(model, data, silent=False)
    inner = {name: _inner_model(field.annotation) for name, field in model.model_fields.items()}
    return {
        name: value if (part := inner.get(name)) is None else with_present_names(part, value)
        for name, value in renamed.items()
    }


def renamed_value(values: dict[str, str]) -> tuple[BeforeValidator, PlainSerializer]:
    """Annotations for a field with renamed values (old -> present), to the same ends as `StrictPart`'s for names."""
    first_names = {present: old for old, present in values.items()}

    def accept(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or value not in values:
            return value
        if not _is_stored(info.context):
            _warn(f"the value {value} of {info.field_name}", values[value])
        return values[value]

    def write(value: Any, info: SerializationInfo) -> Any:
        return first_names.get(value, value) if info.by_alias else value

    return BeforeValidator(accept), PlainSerializer(write)


def _is_stored(context: Any) -> bool:
    return bool((context or {}).get("stored"))


def old_names(model: type[BaseModel]) -> dict[str, str]:
    """Old name of a field -> the present one."""
    fields = model.model_fields.items()
    return {field.serialization_alias: name for name, field in fields if field.serialization_alias}


def _renamed(model: type[BaseModel], data: dict[str, Any], *, silent: bool) -> dict[str, Any]:
    """The fields of one part by their present names. Raises `ValueError` where both names of a field are given."""
    present = old_names(model)
    part = model.__name__.lower()
    for old in present.keys() & data.keys():
        if present[old] in data:
            raise ValueError(f"{old} is the old name of {present[old]}: give only {present[old]}")
        if not silent:
            _warn(f"{part}.{old}", f"{part}.{present[old]}")
    return {present.get(name, name): value for name, value in data.items()}


def _warn(old: str, present: str) -> None:
    """Python shows equal warnings of one place once."""
    warnings.warn(f"{old} was renamed to {present}; the old name still works", RenamedFieldWarning, stacklevel=1)


def as_frozen(data: Any) -> Any:
    """Lists as tuples, all the way down: strict models take tuples only, and people write lists."""
    if isinstance(data, dict):
        return {key: as_frozen(value) for key, value in data.items()}
    return tuple(as_frozen(value) for value in data) if isinstance(data, list | tuple) else data


def one_or_several(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One number, or several different ones; a list of one is that one. Raises `ValueError` with one sentence."""
    try:
        found = check(value)
    except ValidationError as error:  # one entry per kind of value that it could have been
        raise ValueError(error.errors()[-1 if isinstance(value, tuple) else 0]["msg"]) from None
    if not isinstance(found, tuple):
        return found
    if len(set(found)) < max(1, len(found)):
        raise ValueError("give one number, or a list of different ones")
    return found[0] if len(found) == 1 else found


def dump_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model class that holds the last element of `location`, following nested fields and containers."""
    for step in location[:-1]:
        field = model.model_fields.get(str(step))
        if field is None:  # an index or a key of a container: the model found inside it stays
            continue
        inner = _inner_model(field.annotation)
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_model(argument) for argument in get_args(annotation))
    return next((inner for inner in found if inner is not None), None)


def describe_validation_error(error: ValidationError, model: type[BaseModel], origin: str) -> tuple[str, str]:
    """One line that says what is wrong first, and one that says what to do about it."""
    # A misspelt field is often reported as missing too: say the misspelling first.
    first, *rest = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    location = first["loc"]
    where = ".".join(str(step) for step in location)
    more = f" (and {len(rest)} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        holder = _model_at(model, location)
        names = list(holder.model_fields) if holder else []
        near = difflib.get_close_matches(str(location[-1]), names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}"
        return f"{origin}: unknown field {where!r}{more}", hint
    if first["type"] == "missing":
        return f"{origin}: {where!r} is missing{more}", "add it; jobs/recipes has complete examples"
    message = first["msg"].removeprefix("Value error, ")
    if not where:  # of several fields together
        return f"{origin}: {message}{more}", "correct these fields"
    return f"{origin}: {where}: {message}{more}", "correct that field"
