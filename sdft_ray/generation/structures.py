"""Structured answers in responses: JSON values, function calls, Python code.

Each `find_*` function takes the text of a response and returns the value, or None if there is none or if it is
ambiguous, denied ("not {...}") or cut off. Numbers in JSON are exact: 0.1 is 1/10, and true is not 1.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdft_ray.generation.announcements import denied, rejected
from sdft_ray.generation.numbers import MAX_DIGITS

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
_MAX_JSON_CHARS = 200_000
_MAX_STARTS = 200


_STRAY = re.compile(r"\s*[}\]]")
_INLINE = re.compile(r"`([^`\n]+)`")


def fenced(text: str, languages: frozenset[str]) -> list[str]:
    """Contents of the fenced code blocks in these languages (lower case; "" for a block without one), in order."""
    return [match[3] for match in _FENCE.finditer(text) if match[2].lower() in languages]


# --- JSON -------------------------------------------------------------------------------------------------------


def _exact(digits: str) -> Fraction:
    if len(digits) > MAX_DIGITS or abs(int(re.split("[eE]", digits + "e0")[1])) > MAX_DIGITS:
        raise ValueError("the number has too many digits")
    return Fraction(digits)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("duplicate key")
    return content


_DECODER = json.JSONDecoder(parse_int=_exact, parse_float=_exact, parse_constant=_refuse, object_pairs_hook=_distinct)


def parse_json(text: str) -> Any:
    """A whole text as JSON, numbers as `Fraction`. Raises `ValueError`."""
    try:
        value, end = _DECODER.raw_decode(text.strip())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text.strip()):
        raise ValueError("more than one value")
    return value


@dataclass(frozen=True)
class Json:
    """A JSON value; wrapped, because null is a value and None means that there is none."""

    value: Any


def find_json(text: str) -> Json | None:
    """The JSON value of a response: the whole text, a code block, or the longest object or array within prose.

    A string, number, true, false or null counts only as the whole text or a code block. Two different candidates of the
    same rank are no answer.
    """
    text = text.strip()[:_MAX_JSON_CHARS]
    inline = _INLINE.fullmatch(text)
    for candidates in ([inline[1] if inline else text], fenced(text, frozenset({"json", ""}))):
        values = [value for candidate in candidates if (value := _parsed(candidate)) is not None]
        if values:
            return values[0] if all(same_json(value.value, values[0].value) for value in values) else None
    if text.count("```") % 2:
        return None  # cut off within a code block
    try:
        spans = sorted(_embedded(text), key=lambda span: span[0] - span[1])
    except _CutError:
        return None
    if not spans or denied(text[: spans[0][0]]) or _STRAY.match(text, spans[0][1]) or rejected(text[spans[0][1] :]):
        return None
    found = spans[0][2]
    rivals = [value for _, _, value in spans if isinstance(value, type(found))]
    return Json(found) if all(same_json(value, found) for value in rivals) else None


def _parsed(text: str) -> Json | None:
    try:
        return Json(parse_json(text))
    except ValueError:
        return None


class _CutError(Exception):
    """The text ends within an object or array."""


def _embedded(text: str) -> Iterator[tuple[int, int, Any]]:
    """Start, end and value of each object or array that is not nested in another. Raises `_CutError`."""
    position = 0
    for _ in range(_MAX_STARTS):
        start = min((i for i in (text.find("{", position), text.find("[", position)) if i >= 0), default=-1)
        if start < 0:
            return
        try:
            value, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
                raise _CutError from None
            position = start + 1
            continue
        except (ValueError, RecursionError):
            position = start + 1
            continue
        yield start, end, value
        position = end


def same_json(a: Any, b: Any) -> bool:
    """Whether values are equal: key order does not matter, item order does; true is not 1, and 1 is 1.0."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# --- function calls ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One function call: the name of the function and its arguments by name."""

    name: str
    arguments: dict[str, Any]


_TAGGED = re.compile(r"<(tool_call|function_call)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "args", "input")


def find_calls(text: str) -> list[Call] | None:
    """The calls of a response, in order: `<tool_call>` tags, JSON in the usual forms, or Python keyword calls."""
    tagged = [match[2] if match[0].endswith(f"</{match[1]}>") else "" for match in _TAGGED.finditer(text)]
    if tagged:  # one that is cut off is no call
        calls = [_calls_in(value.value) if (value := _parsed(one.strip())) else None for one in tagged]
        return None if None in calls else [call for some in calls for call in some or []]
    value = find_json(text)
    if value is not None and (calls := _calls_in(value.value)):
        return calls
    return _python_calls(text)


def _calls_in(value: Any) -> list[Call] | None:
    if isinstance(value, list):
        some = [_calls_in(item) for item in value]
        return None if not some or None in some else [call for calls in some for call in calls or []]
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("tool_calls"), list):
        return _calls_in(value["tool_calls"])
    if isinstance(value.get("function"), dict):
        return _calls_in(value["function"])
    name = value.get("name", value.get("function"))
    candidates = [value[key] for key in _ARGUMENTS if key in value]
    if not isinstance(name, str) or len(candidates) != 1:
        return None
    arguments = candidates[0]
    if isinstance(arguments, str):  # OpenAI writes the arguments as JSON in a string
        parsed = _parsed(arguments)
        arguments = parsed.value if parsed else None
    return [Call(name, arguments)] if isinstance(arguments, dict) else None


def _python_calls(text: str) -> list[Call] | None:
    """`f(a=1)` or `[f(a=1), g(b="x")]` with literals only: the whole text, a code block or the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    for candidate in [text, *fenced(text, frozenset({"python", "py", "tool_code", ""}))[-1:], *lines[-1:]]:
        try:
            body = ast.parse(candidate.strip(), mode="eval").body
            nodes = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
            return [_python_call(node) for node in nodes] or None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a keyword call")
    literals = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return Call(ast.unparse(node.func), parse_json(json.dumps(literals)))


def same_calls(a: list[Call], b: list[Call]) -> bool:
    """Whether both contain the same calls, in any order: parallel calls are unordered."""
    left = list(b)
    for call in a:
        match = next((c for c in left if c.name == call.name and same_json(c.arguments, call.arguments)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


# --- code -------------------------------------------------------------------------------------------------------


def find_code(text: str) -> str | None:
    """The Python code of a response: the first code block that defines something, else the first that parses.

    Without a code block: the whole text, if it is code.
    """
    blocks = [block for block in fenced(text, frozenset({"python", "python3", "py", ""})) if _tree(block) is not None]
    if not blocks:
        tree = _tree(text)
        return text if tree is not None and _defines(tree) else None
    return next((block for block in blocks if (tree := _tree(block)) and _defines(tree)), blocks[0])


def _tree(code: str) -> ast.Module | None:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if tree.body else None


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)
