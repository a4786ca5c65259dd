"""Checks of structured answers: JSON, function calls, code and its tests, a function of the user."""

from __future__ import annotations

import json

import pytest

from sdft_ray.generation.checks import check_error, verdict

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
JSON_REFERENCE = '{"name": "Ann", "tags": ["a", "b"], "price": 0.10}'
JSON_CASES = [
    ("", JSON_REFERENCE, "kept"),
    ("", '{"price": 0.1, "tags": ["a", "b"], "name": "Ann"}', "kept"),
    ("", 'Here it is:\n```json\n{"name": "Ann", "tags": ["a", "b"], "price": 1e-1}\n```\nDone.', "kept"),
    ("", 'Sure: {"name": "Ann", "tags": ["a", "b"], "price": 0.1}. Anything else?', "kept"),
    ("", 'As [1] says: {"name": "Ann", "tags": ["a", "b"], "price": 0.1}', "kept"),
    ("", '{"name": "Ann", "tags": ["b", "a"], "price": 0.1}', "mismatch"),
    ("", '{"name": "Ann", "tags": ["a", "b"], "price": 0.1000000000000000055}', "mismatch"),
    ("", '{"name": "Ann", "tags": ["a", "b"], "price": "0.1"}', "mismatch"),
    ("", '{"name": "Ann", "tags": ["a", "b"]}', "mismatch"),
    ("", '{"name": "Ann", "tags": ["a", "b"], "price": 0.1', "no_answer"),  # only the inner list is whole
    ("", '{"name": "Ann", "name": "Ann", "price": 0.1}', "no_answer"),
    ("", '{"price": NaN}', "no_answer"),
    ("", "There is no such thing.", "no_answer"),
    ("", '```json\n{"a": 1}\n```\nor\n```json\n{"a": 2}\n```', "no_answer"),
    ("", "[" * 100_000, "no_answer"),
    (SCHEMA, '{"name": "Bob", "age": 3}', "kept"),
    (SCHEMA, '{"name": "Bob", "age": 3.0}', "kept"),
    (SCHEMA, '{"name": "Bob", "age": 3.5}', "mismatch"),
    (SCHEMA, '{"name": "Bob", "age": -1}', "mismatch"),
    (SCHEMA, '{"name": "Bob", "age": true}', "mismatch"),
    (SCHEMA, '{"name": "Bob", "age": 3, "x": null}', "mismatch"),
    (SCHEMA, "Bob is three.", "no_answer"),
]
CALL_REFERENCE = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
CALL_CASES = [
    (CALL_REFERENCE, "kept"),
    ('{"name": "weather", "parameters": {"days": 2, "city": "Oslo"}}', "kept"),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>', "kept"),
    ('[{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 2}"}}]', "kept"),
    ('{"tool_calls": [{"name": "weather", "arguments": {"city": "Oslo", "days": 2.0}}]}', "kept"),
    ("weather(city='Oslo', days=2)", "kept"),
    ('I will look.\n[weather(days=2, city="Oslo")]', "kept"),
    ("weather(city='Oslo', days=3)", "mismatch"),
    ("weather(city='Oslo')", "mismatch"),
    ("weather(city='Oslo', days=True)", "mismatch"),
    ("forecast(city='Oslo', days=2)", "mismatch"),
    ("[weather(city='Oslo', days=2), weather(city='Oslo', days=2)]", "mismatch"),
    ("weather('Oslo', 2)", "no_answer"),
    ("weather(city=Oslo, days=2)", "no_answer"),
    ('<tool_call>{"name": "weather"</tool_call>', "no_answer"),
    ('{"name": "weather"}', "no_answer"),
    ("It is cold in Oslo.", "no_answer"),
]
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
CODE_CASES = [
    ("def add(a, b):\n    return a + b", "kept"),
    ("Like so:\n```python\ndef add(a, b):\n    return a + b\n```\nThen:\n```python\nprint(add(1, 2))\n```", "kept"),
    ("```\nimport math\ndef add(a, b):\n    return math.fsum([a, b])\n```", "kept"),
    ("```python\ndef add(a, b):\n    return a - b\n```", "mismatch"),
    ("```python\ndef add(a, b):\n    raise SystemExit(0)\n```", "mismatch"),
    ("```python\nimport os\ndef add(a, b):\n    os._exit(0)\n```", "mismatch"),
    ("```python\ndef plus(a, b):\n    return a + b\n```", "mismatch"),
    ("```python\ndef add(a, b)\n    return a + b\n```", "no_answer"),
    ("```bash\necho 5\n```", "no_answer"),
    ("You add the two.", "no_answer"),
]


def _verdict(kind: str, reference: str, response: str, check: str = "") -> str:
    row = {"instruction": "Q", "reference_response": reference, "answer_kind": kind, "check": check}
    return verdict(row, response)


@pytest.mark.parametrize(("schema", "response", "expected"), JSON_CASES)
def test_json(schema: str, response: str, expected: str) -> None:
    assert _verdict("json", JSON_REFERENCE, response, schema) == expected


@pytest.mark.parametrize(("response", "expected"), CALL_CASES)
def test_function_calls(response: str, expected: str) -> None:
    assert _verdict("function_call", CALL_REFERENCE, response) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("response", "expected"), CODE_CASES)
def test_code(response: str, expected: str) -> None:
    assert _verdict("code", "", response, TESTS) == expected


def test_parallel_calls_have_no_order() -> None:
    assert _verdict("function_call", "[a(x=1), b(y=2)]", "[b(y=2), a(x=1)]") == "kept"


@pytest.mark.parametrize(("kind", "reference"), [("json", "none"), ("function_call", "none"), ("json", "{'a': 1}")])
def test_a_reference_without_an_answer_is_never_matched(kind: str, reference: str) -> None:
    assert _verdict(kind, reference, reference) == "no_reference_answer"


def _is_short(row: dict[str, str], response: str) -> bool:
    return len(response) < len(row["reference_response"])


def test_a_function_of_the_users() -> None:
    name = f"{__name__}:_is_short"
    assert _verdict("callable", "a long reference", "short", name) == "kept"
    assert _verdict("callable", "brief", "longer than that", name) == "mismatch"
    assert check_error("callable", name) == ""


@pytest.mark.parametrize(
    ("kind", "check", "error"),
    [
        ("json", "{", "not a JSON schema"),
        ("json", '{"type": "objekt"}', "not a JSON schema"),
        ("json", "", ""),
        ("code", "", "needs tests"),
        ("code", "assert (", "not valid Python"),
        ("code", "assert True", ""),
        ("callable", "nowhere", "does not name a function"),
        ("callable", "nowhere:f", "cannot load"),
        ("callable", "json:nothing", "cannot load"),
        ("callable", "json:__doc__", "not callable"),
        ("number", "x", "takes no `check`"),
        ("number", "", ""),
    ],
)
def test_a_bad_check_is_told_when_it_is_read(kind: str, check: str, error: str) -> None:
    assert (error in check_error(kind, check)) is True
    assert bool(check_error(kind, check)) is bool(error)
