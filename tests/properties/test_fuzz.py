"""Whatever a client sends, the service answers in good order: requests made from its own schema, good and bad."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from tests.unit.serving.room import BEARER, make_room

pytestmark = pytest.mark.slow

ROOM = make_room(limits={"max_output_tokens": 8, "request_timeout_s": 30.0})
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", ROOM.app)


@SCHEMA.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_no_request_is_our_mistake(case: Any) -> None:
    response = case.call(headers=BEARER)
    case.validate_response(response, checks=(not_a_server_error,))
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
