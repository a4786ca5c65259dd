"""Request bodies: what clients really send is understood, and every mistake is told with its field."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2
import openai
import pytest
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from sdft_ray.serving.protocol import MAX_SAMPLES, ApiError, ChatRequest, CompletionRequest, parse
from tests.support.real import needs_real_data, real_rows

TURN = {"role": "user", "content": "How many?"}
CHAT: dict[str, Any] = {"model": "student", "messages": [TURN]}
TEXT: dict[str, Any] = {"model": "student", "prompt": "Once"}


def refusal(kind: Any, body: bytes | dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    reason = caught.value
    assert reason.status == 400
    assert reason.body["error"]["type"] == "invalid_request_error"
    assert set(reason.body["error"]) == {"message", "type", "param", "code"}
    assert len(reason.message) < 500
    assert "0x" not in reason.message, "nothing of the inside"
    return reason


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [TURN, {**TURN, **changes}]}


OF_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
    ({"model": "m" * 513}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"presence_penalty": float("-inf")}, "presence_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 0.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": MAX_SAMPLES + 1}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "7"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": [None]}, "stop.0"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"user": 5}, "user"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**4000}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"temprature": 1}, "temprature"),
    ({"str": 1}, "str"),
    ({"list[x": 1}, "list[x"),
]
OF_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"prompt": "x"}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [TURN] * 2049}, "messages"),
    ({"messages": [TURN, "hi"]}, "messages.1"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    (turn(role="tool"), "messages.1.role"),
    (turn(role="User"), "messages.1.role"),
    (turn(content=None), "messages.1.content"),
    (turn(content=5), "messages.1.content"),
    (turn(content=[{"type": "image_url", "text": "x"}]), "messages.1.content.0.type"),
    (turn(content=[{"type": "text", "text": "x"}, {"type": "text"}]), "messages.1.content.1.text"),
    (turn(content=[{"type": "text", "text": "x", "str": 1}]), "messages.1.content.0.str"),
    (turn(content=["x"]), "messages.1.content.0"),
    (turn(tool_calls=[{}]), "messages.1.tool_calls"),
    (turn(name="n" * 513), "messages.1.name"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
]
OF_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": [1, "a"]}, "prompt.1"),
    ({"prompt": ["a", 1]}, "prompt.1"),
    ({"prompt": [[1], "a"]}, "prompt.1"),
    ({"prompt": [[1], [2, None]]}, "prompt.1.1"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [2**31]}, "prompt.0"),
    ({"prompt": [1.0]}, "prompt.0"),
    ({"prompt": [True]}, "prompt.0"),
    ({"prompt": ["a"] * (MAX_SAMPLES + 1)}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": [TURN]}, "messages"),
]


@pytest.mark.parametrize(("change", "name"), [*OF_BOTH, *OF_CHATS])
def test_a_mistake_in_a_chat_names_its_field(change: dict[str, Any], name: str) -> None:
    reason = refusal(ChatRequest, {**CHAT, **change})
    assert reason.param == name
    assert name in reason.message


@pytest.mark.parametrize(("change", "name"), [*OF_BOTH, *OF_COMPLETIONS])
def test_a_mistake_in_a_completion_names_its_field(change: dict[str, Any], name: str) -> None:
    reason = refusal(CompletionRequest, {**TEXT, **change})
    assert reason.param == name
    assert name in reason.message


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (ChatRequest, {**CHAT, "top_logprobs": 3}, ("top_logprobs", "logprobs: true")),
        (ChatRequest, {**CHAT, "logprobs": False, "top_logprobs": 0}, ("top_logprobs",)),
        (ChatRequest, {**CHAT, "max_tokens": 3, "max_completion_tokens": 3}, ("max_tokens", "max_completion_tokens")),
        (CompletionRequest, {**TEXT, "max_tokens": 0}, ("max_tokens", "echo")),
        (CompletionRequest, {**TEXT, "prompt": ["a"] * 65, "n": 2}, ("prompts times n", "128")),
        (CompletionRequest, {**TEXT, "prompt": [[1]] * 2, "n": 65}, ("prompts times n",)),
    ],
)
def test_fields_that_do_not_go_together_are_both_named(kind: Any, body: dict[str, Any], words: tuple[str, ...]) -> None:
    reason = refusal(kind, body)
    assert reason.code == "invalid_value"
    assert all(word in reason.message for word in words)


SURROGATE = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"not json",
        b'{"model": "m",}',
        b"\xef\xbb\xbf" + json.dumps(CHAT).encode(),
        json.dumps(CHAT).encode() + b"x",
        SURROGATE,
        SURROGATE.replace(b"\\ud800", b"\\udc00\\ud800"),
        SURROGATE.replace(b"\\ud800", b"\xff"),
        SURROGATE.replace(b"\\ud800", b"\xed\xa0\x80"),
        SURROGATE.replace(b"\\ud800", b"a\nb"),
        json.dumps(CHAT).encode("utf-16"),
        b"[" * 100_000,
        b'{"messages":' * 100_000,
        b'{"model": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_json_is_told_so(body: bytes) -> None:
    reason = refusal(ChatRequest, body)
    assert reason.code == "invalid_json"
    assert reason.param is None


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"', b"[{}]"])
def test_a_body_is_an_object(body: bytes) -> None:
    assert "object" in refusal(CompletionRequest, body).message


def test_codes_are_openais() -> None:
    assert refusal(ChatRequest, {"model": "m"}).code == "missing_required_parameter"
    assert refusal(ChatRequest, {**CHAT, "functions": [{}]}).code == "unknown_parameter"
    assert refusal(ChatRequest, {**CHAT, "n": 0}).code == "invalid_value"


def test_a_long_name_is_not_told_in_full() -> None:
    assert refusal(ChatRequest, {**CHAT, "x" * 100_000: 1}).param == "x" * 200


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [None] * 400_000},
        {"prompt": [1] * 400_000 + [None] * 10},
        {"prompt": [[None]] * 100_000},
        {"prompt": ["x"] * 400_000},
        {"stop": [1] * 400_000},
        {str(number): 1 for number in range(100_000)},
    ],
    ids=range(6),
)
def test_a_large_body_full_of_mistakes_is_refused_at_once(change: dict[str, Any]) -> None:
    body = json.dumps({**TEXT, **change}).encode()
    began = time.process_time()
    refusal(CompletionRequest, body)
    assert time.process_time() - began < 2  # every mistake told apart: ten seconds


def test_what_a_client_writes_is_what_is_understood() -> None:
    text = "Größe 😀 \x00 \u2028"
    body = json.dumps({**CHAT, "messages": [{**TURN, "content": text}]})
    assert parse(ChatRequest, body.encode()).messages[0].text == text
    assert parse(ChatRequest, json.dumps(json.loads(body), ensure_ascii=False).encode()).messages[0].text == text
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse(ChatRequest, json.dumps({**CHAT, **turn(content=parts), "max_completion_tokens": 9}).encode())
    assert (asked.messages[1].text, asked.limit, asked.scores, asked.stops) == ("ab", 9, None, ())
    scored = parse(ChatRequest, json.dumps({**CHAT, "logprobs": True, "stop": "x", "temperature": 1}).encode())
    assert (scored.scores, scored.stops, scored.temperature) == (0, ("x",), 1.0)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("", [""]), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[Any]) -> None:
    asked = parse(CompletionRequest, json.dumps({**TEXT, "prompt": prompt, "n": None}).encode())
    assert (asked.prompts, asked.num_prompts, asked.limit) == (prompts, len(prompts), 16)


def test_what_openais_client_sends_is_understood() -> None:
    sent: list[bytes] = []

    def keep(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.content)
        return httpx2.Response(200, json={})

    client = openai.OpenAI(api_key="x", http_client=httpx2.Client(transport=httpx2.MockTransport(keep)))
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    client.chat.completions.create(
        model="m",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ann"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "bye"},
        ],
        temperature=0.5, top_p=0.9, n=2, stop=["a", "b"], seed=7, presence_penalty=0.1, frequency_penalty=-0.1,
        stream=True, stream_options={"include_usage": True}, user="u", logprobs=True, top_logprobs=5,
        max_completion_tokens=5, extra_body={"top_k": 5},
    )  # fmt: skip
    for request in sent:
        parse(ChatRequest, request)
    sent.clear()
    client.completions.create(model="m", prompt="Once")
    client.completions.create(
        model="m", prompt=[[1, 2], [3]], max_tokens=3, echo=True, logprobs=2, n=2, stop="x", stream=True, temperature=0
    )
    for request in sent:
        parse(CompletionRequest, request)


def test_what_lm_eval_sends_is_understood() -> None:
    chat: Any = LocalChatCompletion.__new__(LocalChatCompletion)  # to make one, packages are needed that only ask
    chat.model, chat._max_gen_toks = "m", 256
    turns = [{"role": "user", "content": "hi", "type": "text"}]  # as its `apply_chat_template` writes them
    body = chat._create_payload(turns, generate=True, gen_kwargs={"until": ["\n"], "max_gen_toks": 9}, eos="<|end|>")
    asked = parse(ChatRequest, json.dumps(body).encode())
    assert (asked.limit, asked.stops, asked.temperature) == (9, ("\n", "<|end|>"), 0)
    texts: Any = LocalCompletionsAPI.__new__(LocalCompletionsAPI)
    texts.model, texts._max_gen_toks = "m", 256
    body = texts._create_payload([[1, 2, 3], [4, 5]], generate=False)
    scored = parse(CompletionRequest, json.dumps(body).encode())
    assert (scored.prompts, scored.limit, scored.logprobs, scored.echo) == ([[1, 2, 3], [4, 5]], 1, 1, True)
    body = texts._create_payload(["a", "b"], generate=True, gen_kwargs={"until": ["."]}, eos="<|end|>")
    assert parse(CompletionRequest, json.dumps(body).encode()).stops == (".", "<|end|>")


def test_errors_are_typed_as_openai_types_them() -> None:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}
    for status, kind in {**kinds, 404: "invalid_request_error", 504: "server_error"}.items():
        error = ApiError(status, "told", code="c", param="p").body["error"]
        assert error == {"message": "told", "type": kind, "param": "p", "code": "c"}


@needs_real_data
def test_bodies_that_real_clients_send_are_accepted() -> None:
    """All but the one with a tool call, which would change the answer."""
    bodies = real_rows("cases", "serving", "accepted_bodies.jsonl")
    refused = {}
    for row in bodies:
        try:
            parse(ChatRequest, json.dumps(row["body"]).encode())
        except ApiError as reason:
            refused[row["name"]] = reason.param
    assert refused == {"assistant content null": "messages.1.tool_calls"}


@pytest.mark.parametrize("change", [{"tools": [{}]}, {"store": True}, {"min_p": 0.1}, {"logit_bias": {"5": 1}}])
def test_a_field_that_asks_for_something_is_refused_by_name(change: dict[str, Any]) -> None:
    (name,) = change
    assert refusal(ChatRequest, {**CHAT, **change}).param == name
    accepted = parse(ChatRequest, json.dumps({**CHAT, name: None}).encode())
    assert accepted == parse(ChatRequest, json.dumps(CHAT).encode())
