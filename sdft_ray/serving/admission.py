"""Admission control: rate limits per key, and a bounded queue that is fair between clients.

Everything here runs on one event loop and needs no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sdft_ray.serving.access import Key


class RefusedError(Exception):
    """The request is refused for now. `retry_after_s`: seconds after which a retry may succeed."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Bucket:
    """A token bucket: refills at `per_minute`, and holds at most that much.

    The cost of a request is known only after it, so the level may become negative; then no request is admitted until
    the bucket has refilled.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_minute / 60
        self._capacity = float(per_minute)
        self._level = self._capacity
        self._clock = clock
        self._at = clock()

    def wait_s(self, needed: float = 1.0) -> float:
        """Seconds until the level is `needed`; 0 if it is, or will be within a millisecond."""
        self._fill()
        wait_s = (needed - self._level) / self._per_s
        return wait_s if wait_s > 1e-3 else 0.0

    def take(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._at) * self._per_s)
        self._at = now


class Budgets:
    """Requests and tokens per minute of every key that has a limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str, int], Bucket] = {}

    def admit(self, key: Key) -> None:
        """Count one request. Raises `RefusedError` if the key has used up its requests or tokens."""
        requests, tokens = self._of(key, "requests"), self._of(key, "tokens")
        waits = {"requests": requests.wait_s() if requests else 0.0, "tokens": tokens.wait_s() if tokens else 0.0}
        name = max(waits, key=lambda each: waits[each])
        if waits[name] > 0:
            raise RefusedError(f"this key has reached its limit of {name} per minute", waits[name])
        if requests:
            requests.take(1)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of a prompt and its answer."""
        bucket = self._of(key, "tokens")
        if bucket:
            bucket.take(tokens)

    def _of(self, key: Key, what: str) -> Bucket | None:
        per_minute = key.requests_per_minute if what == "requests" else key.tokens_per_minute
        if per_minute is None:
            return None
        # After a change of the limit in the key file, a new bucket is used.
        return self._buckets.setdefault((key.id, what, per_minute), Bucket(per_minute, self._clock))


@dataclass
class Admission:
    """At most `max_running` requests run and `max_queued` wait. Waiting clients are admitted round-robin.

    So a client with a thousand requests delays the first request of another client by one turn only.
    """

    max_running: int
    max_queued: int
    running: int = 0
    queued: int = 0
    _waiting: OrderedDict[str, deque[asyncio.Future[None]]] = field(default_factory=OrderedDict)
    _waking: int = 0
    """Requests that have a slot and will run when the event loop comes to them."""
    _recent_s: float = 1.0

    @asynccontextmanager
    async def slot(self, client: str) -> AsyncIterator[float]:
        """Occupy a slot; yields the seconds waited for it. Raises `RefusedError` if the queue is full."""
        began = time.monotonic()
        await self._enter(client)
        admitted = time.monotonic()
        try:
            yield admitted - began
        finally:
            self._recent_s += 0.1 * (time.monotonic() - admitted - self._recent_s)
            self._leave()

    @property
    def capacity(self) -> int:
        """The largest number of requests that run and wait."""
        return self.max_running + self.max_queued

    def check(self, num: int = 1) -> None:
        """Raises `RefusedError` if the queue has no room for `num` more requests."""
        if self.running + self.queued + num > self.capacity:
            rounds = (self.queued + num) / self.max_running
            raise RefusedError("the queue is full", max(1.0, rounds * self._recent_s))

    async def _enter(self, client: str) -> None:
        if self.running < self.max_running:
            self.running += 1
            if self._waking:
                await self._after_those_that_wake()
            return
        self.check()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self.queued += 1
        try:
            await turn
            self._waking -= 1
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._waking -= 1
                self._leave()  # admitted at the moment of the cancellation
            else:
                self._forget(client, turn)
            raise

    async def _after_those_that_wake(self) -> None:
        """So that a request does not overtake one that came before it and was admitted a moment ago."""
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._leave()
            raise

    def _leave(self) -> None:
        """Pass the slot to the client whose turn it is, or free it."""
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # at the end of the round
            self.queued -= 1
            if not turn.done():
                turn.set_result(None)
                self._waking += 1
                return
        self.running -= 1

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client)
        if turns is not None and turn in turns:
            turns.remove(turn)
            self.queued -= 1
            if not turns:
                del self._waiting[client]
