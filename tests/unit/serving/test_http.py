"""The HTTP face: who may pass, how large and slow a body may be, browsers, errors in OpenAI's form, and the log."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from sdft_ray.serving.access import Key, hash_of, new_secret
from sdft_ray.serving.http import OPEN_PATHS
from tests.unit.serving.room import BEARER, CHAT, KEY, SECRET, TEXT, Room, Visit, body_of, make_room

pytestmark = pytest.mark.anyio
PAGE = "https://page.example"


@pytest.fixture
def room() -> Room:
    return make_room()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error that a request got, in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


async def get(room: Room, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async with room.client(**headers) as client:
        return await client.request(method, path)


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", SECRET, f"Basic {SECRET}",
     "Bearer sk-ü", f"Bearer {KEY.sha256}", f"Token {SECRET}"],
)  # fmt: skip
async def test_without_a_valid_key_nothing_is_told(room: Room, given: str | None) -> None:
    headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
    asked = [("/v1/models", "GET"), ("/v1/models/student", "GET"), (CHAT, "POST"), (TEXT, "POST"), (CHAT, "GET")]
    for path, method in [*asked, ("/metrics", "GET"), ("/nothing", "GET"), ("/nothing", "POST"), ("/healthz/", "GET")]:
        async with room.client() as client:
            answer = await client.request(method, path, headers=headers)
        error = error_of(answer, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "student" not in answer.text
    assert room.engine.asked == []


async def test_a_valid_key_passes_however_its_scheme_is_spelt(room: Room) -> None:
    for given in (f"Bearer {SECRET}", f"bearer {SECRET}", f"BEARER  {SECRET} "):
        assert (await get(room, "/v1/models", Authorization=given)).status_code == 200


async def test_an_expired_key_is_refused_as_a_wrong_one_is() -> None:
    secret = new_secret()
    over = Key(id="over", sha256=hash_of(secret), expires=datetime.now(UTC) - timedelta(seconds=1))
    room = make_room(keys=[over])
    expired = await get(room, "/v1/models", Authorization=f"Bearer {secret}")
    wrong = await get(room, "/v1/models", Authorization="Bearer sk-wrong")
    assert (expired.status_code, expired.json()) == (wrong.status_code, wrong.json())


async def test_where_anyone_may_ask_a_wrong_key_is_still_wrong() -> None:
    room = make_room(allow_anonymous=True)
    assert (await get(room, "/v1/models")).status_code == 200
    assert (await get(room, "/v1/models", **BEARER)).status_code == 200
    error_of(await get(room, "/v1/models", Authorization="Bearer sk-wrong"), 401)


async def test_what_anyone_may_ask_tells_nothing_of_what_is_served(room: Room) -> None:
    assert {"/", "/healthz", "/readyz", "/openapi.json", "/favicon.ico"} == OPEN_PATHS
    for path in OPEN_PATHS - {"/favicon.ico"}:
        answer = await get(room, path)
        assert answer.status_code == 200
        assert "fp_test" not in answer.text
        assert "laptop" not in answer.text
    assert (await get(room, "/readyz")).text == "ready"


async def test_unknown_paths_and_methods_are_told_in_openais_form(room: Room) -> None:
    for path in ("/nothing", "/v1", "/v1/embeddings", "/docs", "/redoc", "/v1/models/"):
        error_of(await get(room, path, **BEARER), 404)
    for path, method in ((CHAT, "GET"), ("/v1/models", "POST"), ("/", "DELETE"), (TEXT, "PUT")):
        answer = await get(room, path, method, **BEARER)
        error_of(answer, 405)
        assert answer.headers["allow"]
    error_of(await get(room, "/favicon.ico"), 404)


async def test_a_body_that_is_said_to_be_too_large_is_not_read() -> None:
    room = make_room(limits={"max_body_bytes": 1024})
    for length in ("1025", "9" * 5000, "-1", "1e9", "x"):
        headers = {**BEARER, "Content-Length": length}
        async with Visit(room.app, [3600.0, b"{}"], headers=headers) as visit:
            await visit.finish()
        assert visit.status == 413
        assert json.loads(visit.body)["error"]["code"] == "body_too_large"
    text = json.dumps(body_of(user="")).encode()
    exact = body_of(user="x" * (512 - 1 - len(text) % 512))
    assert (await room.ask(**exact)).status_code == 200


async def test_a_body_in_chunks_is_counted_as_it_comes() -> None:
    room = make_room(limits={"max_body_bytes": 1024})
    async with Visit(room.app, [b"x" * 600, b"x" * 600, 3600.0, b"x"]) as visit:
        await visit.finish()
    assert visit.status == 413
    whole = json.dumps(body_of()).encode()
    async with Visit(room.app, [whole[:5], 0.01, whole[5:20], b"", whole[20:]]) as visit:
        await visit.finish()
    assert visit.status == 200


async def test_a_body_that_dawdles_is_refused() -> None:
    room = make_room(limits={"body_timeout_s": 0.05})
    async with Visit(room.app, [b"{", 0.03, b" ", 0.03, b" ", 3600.0, b"}"]) as visit:
        await visit.finish()
    assert visit.status == 408
    assert json.loads(visit.body)["error"]["code"] == "body_timeout"
    async with Visit(room.app, [b"{", 0.01]) as visit:
        await visit.leave()
    assert room.engine.asked == []


async def test_bad_bodies_are_told_with_their_field(room: Room) -> None:
    assert error_of(await room.ask(temperature="x"), 400)["param"] == "temperature"
    assert error_of(await room.ask(nonsense=1), 400)["code"] == "unknown_parameter"
    async with room.client(**BEARER) as client:
        for body in (b"", b"[]", b"{", b"\xff"):
            error_of(await client.post(CHAT, content=body), 400)
        typed = await client.post(CHAT, content=json.dumps(body_of()), headers={"Content-Type": "text/plain"})
    assert typed.status_code == 200, "the body counts, not what it is called"


async def test_without_keys_only_names_of_this_machine_are_answered() -> None:
    room = make_room(allow_anonymous=True, local_hosts_only=True)
    for host in ("localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000", "[::1]"):
        assert (await get(room, "/v1/models", Host=host)).status_code == 200, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        "localhost@evil",
        "::1",
    ):
        for path in ("/v1/models", "/", "/healthz"):
            assert error_of(await get(room, path, Host=host), 403)["code"] == "wrong_host", host
    assert (await get(make_room(), "/healthz", Host="evil.example")).status_code == 200


async def asked_by_a_page(room: Room, method: str, **headers: str) -> httpx.Response:
    async with room.client(Origin=PAGE, **headers) as client:
        return await client.request(method, CHAT, json=body_of() if method == "POST" else None)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def test_pages_of_other_origins_may_not_ask_by_default(room: Room) -> None:
    for answer in (
        await asked_by_a_page(room, "POST", **BEARER),
        await asked_by_a_page(room, "OPTIONS", **PREFLIGHT),
        await asked_by_a_page(room, "POST"),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_listed_origins_may_ask_and_others_not() -> None:
    room = make_room(cors_origins=[PAGE])
    asked_first = await asked_by_a_page(room, "OPTIONS", **PREFLIGHT)
    assert asked_first.status_code == 200, "browsers send no key with it"
    assert asked_first.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked_first.headers["access-control-allow-headers"].lower()
    for answer in (await asked_by_a_page(room, "POST", **BEARER), await asked_by_a_page(room, "POST")):
        assert answer.headers["access-control-allow-origin"] == PAGE, "errors can be read too"
        assert "access-control-allow-credentials" not in answer.headers
    async with room.client(Origin="https://evil.example", **BEARER) as client:
        other = await client.post(CHAT, json=body_of())
        refused = await client.options(CHAT, headers=PREFLIGHT)
    assert "access-control-allow-origin" not in other.headers
    assert refused.status_code == 400


async def test_the_page_may_load_nothing_from_elsewhere(room: Room) -> None:
    answer = await get(room, "/")
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert not any("http:" in rule or "https:" in rule or "*" in rule for rule in rules.values())
    assert answer.headers["referrer-policy"] == "no-referrer"
    for path in ("/", "/healthz", "/v1/models", "/nothing"):
        assert (await get(room, path)).headers["x-content-type-options"] == "nosniff"
    async with room.client() as client:
        told = (await client.get("/")).text
    assert 'src="http' not in told
    assert 'href="http' not in told


def references(value: Any) -> list[str]:
    """All `$ref`s of a schema."""
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for inner in value.values() for each in references(inner)]
    return [each for inner in value for each in references(inner)] if isinstance(value, list) else []


async def test_the_schema_is_whole_and_holds_the_bodies(room: Room) -> None:
    schema = (await get(room, "/openapi.json")).json()
    assert schema["openapi"].startswith("3.")
    assert {CHAT, TEXT, "/v1/models", "/healthz"} <= set(schema["paths"])
    for reference in references(schema):
        found: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert isinstance(found, dict)
    for path, name in ((CHAT, "ChatRequest"), (TEXT, "CompletionRequest")):
        operation = schema["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert operation["security"] == [{"key": []}]
        assert {"400", "401", "404", "413", "429", "503", "504"} <= set(operation["responses"])
        assert "422" not in operation["responses"]
    assert schema["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert {"model", "messages"} == set(schema["components"]["schemas"]["ChatRequest"]["required"])
    assert "security" not in schema["paths"]["/healthz"]["get"]


async def test_the_log_names_the_key_and_never_shows_it(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await room.ask()
    await room.ask(headers={"Authorization": "Bearer sk-wrong-key"})
    await room.ask(model="other", temperature="x")
    lines = [record.getMessage() for record in caplog.records if record.name == "sdft_ray.serving.http"]
    assert len(lines) == 3
    assert f"POST {CHAT} 200 key=laptop model=student prompt=" in lines[0]
    assert " answer=1 " in lines[0]
    assert " 401 key=anonymous model= " in lines[1]
    assert " 400 key=laptop " in lines[2]
    assert not any(text in caplog.text for text in (SECRET, KEY.sha256, "wrong-key", "How many?", "Seven"))


async def test_nothing_that_a_client_writes_begins_a_line_of_the_log(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await get(room, "/v1/models/x%0aINFO%20key=admin%1b%5b2J", **BEARER)
    await get(room, "/%0d%0aINFO" + "x" * 5000)
    await room.ask(model="x\nINFO key=admin \x1b[2J \u2028")
    lines = [record.getMessage() for record in caplog.records if record.name == "sdft_ray.serving.http"]
    assert len(lines) == 3
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 600


async def test_figures_are_for_keys_that_may_ask_every_model() -> None:
    secret = new_secret()
    some = Key(id="some", sha256=hash_of(secret), models=("student",))
    limited = make_room(keys=(some,))
    error = error_of(await get(limited, "/metrics", Authorization=f"Bearer {secret}"), 403)
    assert error["type"] == "permission_error"
    whole = await get(make_room(), "/metrics", **BEARER)
    assert whole.status_code == 200
    assert "sdft_serve_requests_total" in whole.text
