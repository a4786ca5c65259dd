"""Bodies, for all bytes and all JSON: they are understood or refused with a reason, and nothing else happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse

PATIENT = settings(deadline=None, max_examples=100)
KINDS = pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "role", "content", "type", "text"})
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["user", "text", "developer", 2**31, -(2**63), 1e308])
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
TURN = {"role": "user", "content": "x"}


def tried(kind: Any, body: bytes) -> Any:
    """The request, or None for a refusal that a client can act on."""
    try:
        return parse(kind, body)
    except ApiError as reason:
        told, found = reason, reason.body["error"]
    assert told.status == 400
    assert found["message"]
    json.dumps(told.body).encode("ascii")
    return None


@KINDS
@PATIENT
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(kind: Any, body: bytes) -> None:
    tried(kind, body)


@KINDS
@PATIENT
@given(JSON)
def test_any_json(kind: Any, value: Any) -> None:
    tried(kind, json.dumps(value).encode())


@KINDS
@PATIENT
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_any_value_in_any_field(kind: Any, changes: dict[str, Any]) -> None:
    good = {"model": "m", "messages": [TURN]} if kind is ChatRequest else {"model": "m", "prompt": "x"}
    request = tried(kind, json.dumps({**good, **changes}).encode())
    if request is not None:
        assert request.stops is not None
        assert request.limit is None or request.limit >= 0
        assert request.temperature is None or 0 <= request.temperature <= 2


@PATIENT
@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_texts_come_through_as_they_are(text: str, prompts: list[str]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    for is_ascii in (True, False):
        told = json.dumps(body, ensure_ascii=is_ascii).encode()
        assert parse(ChatRequest, told).messages[0].text == text
        told = json.dumps({"model": "m", "prompt": prompts}, ensure_ascii=is_ascii).encode()
        assert parse(CompletionRequest, told).prompts == prompts
