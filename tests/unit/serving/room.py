"""The application over scripted engines and the laboratory's tokenizer, and clients that ask it in memory."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import httpx

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.engines.request import AnswerDelta, GenerationRequest, TokenScore
from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.access import Key, KeyRing, hash_of
from sdft_ray.serving.admission import Admission
from sdft_ray.serving.http import build_app
from sdft_ray.serving.service import LoadedModel, Service
from sdft_ray.serving.settings import ServeSettings
from tests.support.scripted_engine import ScriptedEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
VOCAB = 1200
SECRET = "sk-" + "a1" * 21 + "z"
KEY = Key(id="laptop", sha256=hash_of(SECRET))
BEARER = {"Authorization": f"Bearer {SECRET}"}


@cache
def laboratory() -> tuple[Any, ChatFormat]:
    """Its tokenizer, which begins a text with a control token and has one for each role."""
    tokenizer = load_tokenizer(TEACHER)
    return tokenizer, ChatFormat(tokenizer)


class ScoredEngine(ScriptedEngine):
    """Tells made-up log-probabilities as well: -1 for each token, and the likeliest "up" -0.5, "down" -2, ..."""

    async def answer(self, ask: GenerationRequest) -> AsyncGenerator[AnswerDelta, None]:
        """See `Engine.answer`; asked for no token, it tells of the prompt alone."""
        prompt = () if ask.prompt_top_logprobs is None else self._of_prompt(ask)
        if ask.max_tokens == 0:
            yield AnswerDelta("", 0, "length", (), prompt)
            return
        async for piece in super().answer(ask):
            words = [] if ask.top_logprobs is None else re.findall(r"\s*\S+", piece.text)
            scores = tuple(TokenScore(word, -1.0, likeliest(ask.top_logprobs or 0)) for word in words)
            yield replace(piece, scores=scores, prompt_scores=prompt)
            prompt = ()

    def _of_prompt(self, ask: GenerationRequest) -> tuple[TokenScore, ...]:
        tokenizer, _ = laboratory()
        top = likeliest(ask.prompt_top_logprobs or 0)
        scores = (TokenScore(tokenizer.decode([token]), -1.0, top) for token in ask.prompt_ids[1:])
        return (TokenScore("", None), *scores)


def likeliest(num: int) -> tuple[tuple[str, float], ...]:
    return (("up", -0.5), ("down", -2.0), ("up", float("-inf")))[:num]


@dataclass
class Room:
    """An application and what is behind it."""

    app: Any
    service: Service
    engine: ScriptedEngine
    """The first model's."""

    @property
    def admission(self) -> Admission:
        return next(iter(self.service.models.values())).admission

    @asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers) as client:
            yield client

    async def ask(self, path: str = CHAT, *, headers: dict[str, str] = BEARER, **body: Any) -> httpx.Response:
        """One request; a body lacks only what this adds."""
        async with self.client(**headers) as client:
            return await client.post(path, json=body_of(path, **body))


def body_of(path: str = CHAT, **fields: Any) -> dict[str, Any]:
    given = {"prompt": "Once"} if path == TEXT else {"messages": [{"role": "user", "content": "How many?"}]}
    return {"model": "student", **given, **fields}


def make_room(
    engine: ScriptedEngine | None = None,
    *,
    keys: Sequence[Key] = (KEY,),
    names: Iterable[str] = ("student",),
    has_chat: bool = True,
    limits: dict[str, Any] | None = None,
    **access: Any,
) -> Room:
    """An application. All models have engines of their own; `engine` is the first one's."""
    engine = engine or ScoredEngine(vocab_size=VOCAB)
    told = {"models": [{"name": name, "source": "x"} for name in names], "limits": limits or {}, "access": access}
    settings = ServeSettings.parse(told, "these settings")
    tokenizer, chat = laboratory()
    models = {}
    for name in names:
        admission = Admission(settings.limits.max_running, settings.limits.max_queued)
        own = engine if not models else ScoredEngine(lambda _, name=name: name, vocab_size=VOCAB)
        models[name] = LoadedModel(
            name, own, tokenizer, chat if has_chat else None, admission, "fp_test", 5, {"role": "x"}
        )
    service = Service(models, settings.limits)
    ring = KeyRing(None, keys, allow_anonymous=settings.access.allow_anonymous)
    return Room(build_app(service, ring, settings), service, engine)


def events_of(answer: bytes) -> list[Any]:
    """What a stream told: JSON, and at last "[DONE]"."""
    *blocks, rest = answer.split(b"\n\n")
    assert rest == b""
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in blocks)
    told = [block.removeprefix(b"data: ").decode() for block in blocks]
    return [each if each == "[DONE]" else json.loads(each) for each in told]


class Visit:
    """A request whose client dawdles over its body, sees the answer as it comes, and may leave.

    `body` is chunks, with a number wherever so many seconds pass.
    """

    def __init__(
        self, app: Any, body: bytes | Sequence[bytes | float], path: str = CHAT, headers: dict[str, str] = BEARER
    ) -> None:
        named = [(name.lower().encode(), value.encode()) for name, value in {"Host": "localhost", **headers}.items()]
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "scheme": "http",
            "headers": named, "server": ("localhost", 8000), "client": ("127.0.0.1", 5),
        }  # fmt: skip
        self._app = app
        self._chunks = [body] if isinstance(body, bytes) else list(body)
        self._gone = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __aenter__(self) -> Visit:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """Close the connection, and wait until the application is through with it."""
        self._gone.set()
        with suppress(asyncio.CancelledError):
            await self._task

    async def finish(self) -> None:
        """Wait for the whole answer."""
        await self._task

    async def _receive(self) -> dict[str, Any]:
        while self._chunks and not isinstance(self._chunks[0], bytes):
            await asyncio.sleep(self._chunks.pop(0))  # type: ignore[arg-type]
        if self._chunks:
            chunk = self._chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif not self._gone.is_set():
            self.body += message.get("body", b"")


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for two seconds at most."""
    async with asyncio.timeout(2):
        while not holds():
            await asyncio.sleep(0.001)
