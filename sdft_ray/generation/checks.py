"""Typed checks: whether a response agrees with its reference, or passes the check of its row.

| answer kind | passes when | `check` of the row |
|---|---|---|
| number, choice, text, list | the extracted answers are equal | - |
| json | valid by the schema, or equal to the reference's value without one | a JSON schema, or "" |
| function_call | the same calls with the same arguments | - |
| code | the code passes the tests, in a sandbox | Python asserts |
| callable | `function(row, response)` is true | `module:function` |
| none | always | - |

A response without an answer never passes, not even if the reference has none either.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

from sdft_ray.errors import DataError
from sdft_ray.generation.answers import equal, extract
from sdft_ray.generation.structures import Json, find_calls, find_code, find_json, same_calls, same_json

Verdict = Literal["kept", "mismatch", "no_answer", "no_reference_answer"]


def verdict(row: Mapping[str, str], response: str) -> Verdict:
    """The result of checking `response` against the row's `reference_response`, `answer_kind` and `check`."""
    kind = row["answer_kind"]
    if kind == "none":
        return "kept"
    return _CHECKS.get(kind, _by_answer)(row, response)


def check_error(kind: str, check: str) -> str:
    """What is wrong with a row's `check`, or "". Called when the seed set is read, before anything is generated."""
    if kind == "code":
        return _code_error(check)
    if kind == "callable":
        try:
            _function(check)
        except DataError as reason:
            return reason.message
        return ""
    if kind == "json" and check:
        return _schema_error(check)
    return f"answer kind {kind} takes no `check`" if check and kind not in _CHECKS else ""


def _by_answer(row: Mapping[str, str], response: str) -> Verdict:
    kind = row["answer_kind"]
    expected, actual = extract(kind, row["reference_response"]), extract(kind, response)
    if expected is None:
        return "no_reference_answer"
    if actual is None:
        return "no_answer"
    return _verdict_of(equal(kind, expected, actual))


def _json(row: Mapping[str, str], response: str) -> Verdict:
    actual = find_json(response)
    if row["check"]:
        return "no_answer" if actual is None else _verdict_of(_validator(row["check"]).is_valid(_plain(actual)))
    expected = find_json(row["reference_response"])
    if expected is None:
        return "no_reference_answer"
    return "no_answer" if actual is None else _verdict_of(same_json(expected.value, actual.value))


def _function_call(row: Mapping[str, str], response: str) -> Verdict:
    expected, actual = find_calls(row["reference_response"]), find_calls(response)
    if not expected:
        return "no_reference_answer"
    return "no_answer" if not actual else _verdict_of(same_calls(expected, actual))


def _code(row: Mapping[str, str], response: str) -> Verdict:
    from sdft_ray.generation.sandbox import run_tests

    code = find_code(response)
    return "no_answer" if code is None else _verdict_of(run_tests(code, row["check"]).outcome == "passed")


def _callable(row: Mapping[str, str], response: str) -> Verdict:
    return _verdict_of(bool(_function(row["check"])(dict(row), response)))


_CHECKS: dict[str, Callable[[Mapping[str, str], str], Verdict]] = {
    "json": _json,
    "function_call": _function_call,
    "code": _code,
    "callable": _callable,
}


def _verdict_of(passes: bool) -> Verdict:
    return "kept" if passes else "mismatch"


def _plain(json_value: Json) -> Any:
    """The value with int and float in place of `Fraction`, which the validator does not know."""
    return json.loads(
        json.dumps(json_value.value, default=lambda number: int(number) if number.denominator == 1 else float(number))
    )


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for

    parsed = json.loads(schema)
    return validator_for(parsed)(parsed)


def _schema_error(schema: str) -> str:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    try:
        parsed = json.loads(schema)
        validator_for(parsed).check_schema(parsed)
    except ValueError as reason:
        return f"`check` is not a JSON schema: {reason}"
    except SchemaError as reason:
        return f"`check` is not a JSON schema: {reason.message}"
    return ""


def _code_error(tests: str) -> str:
    if not tests.strip():
        return "answer kind code needs tests in `check`"
    try:
        compile(tests, "check", "exec")
    except (SyntaxError, ValueError) as reason:
        return f"the tests in `check` are not valid Python: {reason}"
    return ""


@lru_cache(maxsize=64)
def _function(name: str) -> Callable[[dict[str, str], str], Any]:
    """The function that `module:function` names. Raises `DataError`."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise DataError(f"{name!r} does not name a function", "write `module:function` into `check`")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as reason:
        raise DataError(f"cannot load {name}: {reason}", "install the module on every node of the cluster") from None
    if not callable(function):
        raise DataError(f"{name} is not callable", "name a function that takes a row and a response")
    return function
