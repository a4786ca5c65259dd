"""What goes wrong while a request is answered: limits, a full queue, a slow or dead engine, a client who leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sdft_ray.serving.access import Key, hash_of
from tests.support.scripted_engine import ScriptedEngine
from tests.unit.serving.room import (
    BEARER,
    CHAT,
    KEY,
    TEXT,
    VOCAB,
    Room,
    Visit,
    body_of,
    events_of,
    laboratory,
    make_room,
    until,
)

pytestmark = pytest.mark.anyio
BOTH = pytest.mark.parametrize("stream", [False, True])


def slow(words: int = 200, delay_s: float = 0.01) -> ScriptedEngine:
    """Answers that last two seconds."""
    return ScriptedEngine(lambda _: " word" * words, delay_s=delay_s, max_model_tokens=4096, vocab_size=VOCAB)


def body(**fields: Any) -> bytes:
    return json.dumps(body_of(**fields)).encode()


async def error_of(room: Room, status: int, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    """The error that a request gets, in OpenAI's form."""
    answer = await room.ask(path, **fields)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def is_idle(room: Room) -> bool:
    return (room.engine.running, room.admission.running, room.admission.queued) == (0, 0, 0)


async def test_a_model_that_is_not_there_or_not_for_this_key() -> None:
    some = KEY.model_copy(update={"models": ("student",)})
    room = make_room(names=("student", "teacher"), keys=[some])
    for name in ("teacher", "nothing", "student ", "../student"):
        error = await error_of(room, 404, model=name)
        assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
        assert error["message"].endswith("models: student"), "others are not told"
    async with room.client(**BEARER) as client:
        assert [each["id"] for each in (await client.get("/v1/models")).json()["data"]] == ["student"]
        assert (await client.get("/v1/models/teacher")).status_code == 404
    assert (await room.ask()).status_code == 200


async def test_what_does_not_fit_the_context_is_refused() -> None:
    engine = ScriptedEngine(max_model_tokens=12, vocab_size=VOCAB)
    room = make_room(engine)
    error = await error_of(room, 400, TEXT, prompt=[0, *[5] * 11])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "12 tokens" in error["message"]
    error = await error_of(room, 400, messages=[{"role": "user", "content": "word " * 100}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    error = await error_of(room, 400, TEXT, prompt=[0], max_tokens=13)
    assert (error["code"], error["param"]) == ("invalid_value", "max_tokens")
    assert (await room.ask(TEXT, prompt=[0, *[5] * 11], max_tokens=0, echo=True)).status_code == 200
    assert (await room.ask(TEXT, prompt=[0, *[5] * 10], max_tokens=9)).status_code == 200
    assert engine.asked[-1].max_tokens == 1, "as much as fits"


async def test_limits_of_the_service_are_kept() -> None:
    room = make_room(limits={"max_prompt_tokens": 3, "max_output_tokens": 2})
    assert (await error_of(room, 400, TEXT, prompt=[0, 5, 5, 5]))["code"] == "context_length_exceeded"
    assert (await error_of(room, 400, TEXT, prompt=[0], max_tokens=3))["param"] == "max_tokens"
    assert (await room.ask(TEXT, prompt=[0, 5, 5], max_tokens=2)).status_code == 200


async def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    room = make_room()
    assert (await room.ask(TEXT, prompt=[VOCAB - 1])).status_code == 200
    for token in (VOCAB, 2**31 - 1):
        error = await error_of(room, 400, TEXT, prompt=[0, token], echo=True)
        assert str(token) in error["message"]
        assert error["param"] == "prompt"


async def test_a_control_token_that_the_template_does_not_keep_apart_is_refused() -> None:
    room = make_room()
    tokenizer, _ = laboratory()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("message['content']", "message['content'] | upper")
        error = await error_of(room, 400, messages=[{"role": "user", "content": "x <|end|>"}])
    finally:
        tokenizer.chat_template = template
    assert error["code"] == "invalid_prompt"
    assert "<|end|>" in error["message"]


async def test_a_full_queue_refuses_with_the_time_to_come_again() -> None:
    room = make_room(slow(), limits={"max_running": 1, "max_queued": 1})
    async with Visit(room.app, body()), Visit(room.app, body()):
        await until(lambda: (room.admission.running, room.admission.queued) == (1, 1))
        for stream in (False, True):
            answer = await room.ask(stream=stream)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert answer.json()["error"]["type"] == "rate_limit_error"
    await until(lambda: is_idle(room))


@BOTH
async def test_requests_that_come_at_the_same_moment_find_the_queue_full_too(stream: bool) -> None:
    room = make_room(limits={"max_running": 1, "max_queued": 1})
    found = await asyncio.gather(*(room.ask(stream=stream) for _ in range(4)))
    assert sorted(answer.status_code for answer in found) == [200, 200, 429, 429]
    assert is_idle(room)


async def test_samples_take_places_one_by_one_and_are_refused_together() -> None:
    room = make_room(slow(), limits={"max_running": 2, "max_queued": 1})
    error = await error_of(room, 400, n=4)
    assert error["param"] == "n"
    async with Visit(room.app, body()):
        await until(lambda: room.admission.running == 1)
        await error_of(room, 429, n=3)
        async with Visit(room.app, body(n=2)):
            await until(lambda: (room.admission.running, room.admission.queued) == (2, 1))
    await until(lambda: is_idle(room))


async def test_a_key_that_has_used_up_its_requests_or_tokens() -> None:
    for limits, seconds in (({"requests_per_minute": 1}, 60), ({"tokens_per_minute": 7}, 9)):
        other = Key(id="other", sha256="0" * 64)
        room = make_room(ScriptedEngine(lambda _: "a b", vocab_size=VOCAB), keys=[KEY.model_copy(update=limits), other])
        assert (await room.ask(TEXT, prompt=[0, 1, 2, 3, 4, 5])).status_code == 200
        answer = await room.ask(TEXT)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) in (seconds, seconds + 9)  # 8 tokens of 7: one too many, and one more
        assert next(iter(limits)).replace("_", " ")[:8] in answer.json()["error"]["message"]
        assert len(room.engine.asked) == 1


async def test_a_request_that_lasts_too_long_ends() -> None:
    room = make_room(slow(), limits={"request_timeout_s": 0.05})
    error = await error_of(room, 504)
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    assert "0.05 s" in error["message"]
    assert is_idle(room)
    *events, last = events_of((await room.ask(stream=True)).content)
    assert last["error"]["code"] == "timeout"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events).startswith(" word")
    assert is_idle(room)


async def test_waiting_for_a_turn_counts_as_well() -> None:
    room = make_room(slow(), limits={"request_timeout_s": 0.05, "max_running": 1})
    async with room.admission.slot("another"):
        await error_of(room, 504)
        await error_of(room, 504, stream=True)


async def test_a_dead_engine_is_told_and_the_service_is_no_longer_healthy() -> None:
    room = make_room()
    async with room.client() as client:
        assert (await client.get("/healthz")).text == "ok"
        room.engine.died = "out of memory"
        for stream in (False, True):
            answer = await room.ask(stream=stream)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "10"
            assert answer.json()["error"]["code"] == "engine_restarting"
        for path in ("/healthz", "/readyz"):
            health = await client.get(path)
            assert health.status_code == 503
            assert health.json()["error"]["code"] == "engine_died"
    assert is_idle(room)


@pytest.mark.parametrize("num", [1, 3])
async def test_an_engine_that_dies_under_way_is_the_last_event_of_a_stream(num: int) -> None:
    room = make_room(slow())
    async with Visit(room.app, body(stream=True, n=num)) as visit:
        await until(lambda: visit.body.count(b"word") > num)
        room.engine.died = "out of memory"
        await visit.finish()
    *events, last = events_of(visit.body)
    assert visit.status == 200
    assert last["error"]["code"] == "engine_restarting"
    assert last["error"]["type"] == "server_error"
    assert all("choices" in event for event in events)
    assert "memory" not in visit.body.decode(), "clients are not told of the inside"
    await until(lambda: is_idle(room))


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}], ids=str)
async def test_when_the_client_leaves_the_engine_stops(fields: dict[str, Any]) -> None:
    room = make_room(slow())
    async with Visit(room.app, body(**fields)) as visit:
        await until(lambda: room.engine.running == fields.get("n", 1))
        if "stream" in fields:
            await until(lambda: b"word" in visit.body)
        await visit.leave()
        await until(lambda: is_idle(room))
    assert visit.status == (200 if "stream" in fields else 499)


@BOTH
async def test_who_leaves_the_queue_is_not_answered_and_holds_up_nobody(stream: bool) -> None:
    room = make_room(slow(words=30), limits={"max_running": 1})
    async with Visit(room.app, body(stream=stream)) as first:
        await until(lambda: room.engine.running == 1)
        async with Visit(room.app, body(stream=stream)) as second:
            await until(lambda: room.admission.queued == 1)
            await second.leave()
        assert (room.admission.running, room.admission.queued) == (1, 0)
        await first.finish()
    assert first.status == 200
    assert first.body.count(b"word") == 30
    assert len(room.engine.asked) == 1
    await until(lambda: is_idle(room))


@BOTH
async def test_tokens_of_an_answer_that_was_cut_off_are_counted(stream: bool) -> None:
    room = make_room(slow(), keys=[KEY.model_copy(update={"tokens_per_minute": 3})])
    async with Visit(room.app, body(stream=stream)) as visit:
        await until(lambda: room.engine.running == 1 and (not stream or b"word" in visit.body))
    assert (await room.ask()).status_code == 429


async def test_one_clients_crowd_does_not_hold_up_another() -> None:
    one, other = ({"Authorization": f"Bearer {name}"} for name in ("one", "other"))
    keys = [Key(id=name, sha256=hash_of(name)) for name in ("one", "other")]
    room = make_room(slow(words=3, delay_s=0.002), keys=keys, limits={"max_running": 1})
    finished: list[str] = []

    async def ask(name: str, headers: dict[str, str]) -> None:
        assert (await room.ask(headers=headers)).status_code == 200
        finished.append(name)

    crowd = [asyncio.create_task(ask("one", one)) for _ in range(12)]
    await until(lambda: room.admission.queued == 11)
    await asyncio.gather(ask("other", other), *crowd)
    assert finished.index("other") <= 2


async def test_an_error_of_ours_says_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> str:
        raise RuntimeError("the password is 1234")

    room = make_room(ScriptedEngine(broken, vocab_size=VOCAB))
    error = await error_of(room, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "1234" not in error["message"]
    assert "the password is 1234" in caplog.text, "the log has it"
    assert is_idle(room)
