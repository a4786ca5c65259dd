"""Many clients of an OpenAI-compatible server at once, and what they see."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

MODEL = "teacher"


@dataclass(frozen=True)
class Seen:
    """One request: its status (0: the connection broke), seconds, and what came."""

    status: int
    took_s: float
    first_s: float = 0.0
    num_tokens: int = 0
    num_events: int = 0


@dataclass(frozen=True)
class Load:
    """A time under load."""

    requests_per_s: float
    tokens_per_s: float
    events_per_s: float
    median_s: float
    statuses: dict[int, int]


def question(number: int) -> str:
    """Different ones of about equal length."""
    return f"A farmer has {number % 90 + 10} hens and sells {number % 10} of them. How many hens does the farmer keep?"


async def ask(session: aiohttp.ClientSession, url: str, number: int, *, stream: bool, **other: Any) -> Seen:
    """One chat, read to its end."""
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": question(number)}], **other}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                await answer.read()
                return Seen(answer.status, time.perf_counter() - began)
            if not stream:
                told = await answer.json()
                return Seen(200, time.perf_counter() - began, 0.0, told["usage"]["completion_tokens"], 1)
            first_s, num_events, last = 0.0, 0, b""
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    first_s = first_s or time.perf_counter() - began
                    num_events, last = num_events + 1, line
            spent = json.loads(last[6:])["usage"]["completion_tokens"]
            return Seen(200, time.perf_counter() - began, first_s, spent, num_events)
    except (aiohttp.ClientError, ConnectionError, TimeoutError, json.JSONDecodeError, KeyError, TypeError):
        return Seen(0, time.perf_counter() - began)


async def press(url: str, *, clients: int, seconds: float, stream: bool, warm_up: bool = True, **other: Any) -> Load:
    """Keep `clients` requests under way for about `seconds`; each client asks again when it has its answer."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    ) as session:
        if warm_up:
            await asyncio.gather(*(ask(session, url, n, stream=stream, seed=n, **other) for n in range(clients)))
        seen: list[Seen] = []
        numbers = iter(range(1000, 10**9))
        began = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - began < seconds:
                number = next(numbers)
                seen.append(await ask(session, url, number, stream=stream, seed=number, **other))

        await asyncio.gather(*(client() for _ in range(clients)))
        took_s = time.perf_counter() - began
    good = [each for each in seen if each.status == 200]
    return Load(
        requests_per_s=len(good) / took_s,
        tokens_per_s=sum(each.num_tokens for each in good) / took_s,
        events_per_s=sum(each.num_events for each in good) / took_s,
        median_s=statistics.median(each.took_s for each in good) if good else float("nan"),
        statuses=dict(Counter(each.status for each in seen)),
    )
