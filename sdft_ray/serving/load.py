"""A load generator for OpenAI-compatible servers: concurrent clients, and a record of every request."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Body = dict[str, Any]


@dataclass(frozen=True)
class RequestTrace:
    """The record of one chat request, on the client's side. `status` is 0 if the connection failed."""

    status: int
    began: float
    """When it was sent, on the clock of `time.perf_counter`."""
    took_s: float
    first_s: float = 0.0
    """Seconds until the first token; 0 without streaming."""
    text: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return self.usage.get("completion_tokens", 0)

    def predicted(self, kind: str) -> int:
        """Number of draft-model tokens of a kind: `accepted` or `rejected`."""
        return (self.usage.get("completion_tokens_details") or {}).get(f"{kind}_prediction_tokens", 0)


@dataclass(frozen=True)
class Load:
    """All requests of a period of load."""

    took_s: float
    seen: Sequence[RequestTrace]

    @property
    def good(self) -> list[RequestTrace]:
        return [each for each in self.seen if each.status == 200]

    @property
    def tokens_per_s(self) -> float:
        return sum(each.num_tokens for each in self.good) / self.took_s

    @property
    def median_s(self) -> float:
        return statistics.median(each.took_s for each in self.good)

    @property
    def median_first_s(self) -> float:
        return statistics.median(each.first_s for each in self.good)

    @property
    def accepted_share(self) -> float | None:
        """Fraction of a draft model's tokens that were accepted; None without a draft model."""
        accepted, rejected = (sum(each.predicted(kind) for each in self.good) for kind in ("accepted", "rejected"))
        return accepted / (accepted + rejected) if accepted + rejected else None

    @property
    def statuses(self) -> dict[int, int]:
        return dict(Counter(each.status for each in self.seen))


def chat_body(model: str, prompt: str, **other: Any) -> Body:
    """The body of a chat request with one prompt. With `stream`, it also requests the usage."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], **other}
    return {**body, "stream_options": {"include_usage": True}} if other.get("stream") else body


async def ask(session: aiohttp.ClientSession, url: str, body: Body) -> RequestTrace:
    """Send one chat request and read the response to its end. `url` ends in `/v1`."""
    began = time.perf_counter()
    try:
        async with session.post(f"{url}/chat/completions", json=body) as answer:
            if answer.status != 200:
                await answer.read()
                return RequestTrace(answer.status, began, time.perf_counter() - began)
            if not body.get("stream"):
                reply = await answer.json()
                text = reply["choices"][0]["message"]["content"]
                return RequestTrace(200, began, time.perf_counter() - began, 0.0, text, reply["usage"])
            return await _streamed(answer, began)
    except (aiohttp.ClientError, ConnectionError, TimeoutError, json.JSONDecodeError, KeyError, TypeError):
        return RequestTrace(0, began, time.perf_counter() - began)


async def _streamed(answer: aiohttp.ClientResponse, began: float) -> RequestTrace:
    first_s, lines = 0.0, []
    async for line in answer.content:
        if line.startswith(b"data: {"):
            lines.append(line)
            if not first_s and b'"content": ""' not in line and b'"content":""' not in line:
                first_s = time.perf_counter() - began
    took_s = time.perf_counter() - began  # excludes parsing
    events = [json.loads(line[6:]) for line in lines]
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return RequestTrace(200, began, took_s, first_s, text, events[-1]["usage"])


async def press(
    url: str,
    body_of: Callable[[int], Body],
    *,
    clients: int,
    seconds: float = float("inf"),
    num_requests: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Keep `clients` requests in flight for about `seconds`, or until `num_requests` are answered.

    `body_of` gives the body of request n, 0-based. Each client sends its next request when it has its response.
    """
    limits = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=limits, timeout=timeout, headers=headers) as session:
        seen: dict[int, RequestTrace] = {}
        numbers = iter(range(num_requests if num_requests is not None else 10**9))
        began = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - began < seconds and (number := next(numbers, None)) is not None:
                seen[number] = await ask(session, url, body_of(number))

        await asyncio.gather(*(client() for _ in range(clients)))
        took_s = time.perf_counter() - began
    return Load(took_s, [seen[number] for number in sorted(seen)])
