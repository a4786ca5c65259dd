"""Budgets and turns, for all orders of events: they equal a plain account, and nobody and nothing is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.serving.admission import Admission, Bucket, RefusedError

PATIENT = settings(deadline=None, max_examples=80)  # machines may be busy


@PATIENT
@given(
    per_minute=st.integers(1, 10_000),
    events=st.lists(st.tuples(st.integers(0, 120_000), st.integers(0, 20_000), st.integers(0, 3)), max_size=30),
)
def test_a_bucket_is_a_plain_account(per_minute: int, events: list[tuple[int, int, int]]) -> None:
    """Milliseconds pass, so much is taken: the account in fractions, filled up step by step."""
    now = 0.0
    bucket = Bucket(per_minute, lambda: now)
    left, elapsed_ms = Fraction(per_minute), 0
    for passed_ms, amount, needed in events:
        elapsed_ms += passed_ms
        now = elapsed_ms / 1000
        left = min(Fraction(per_minute), left + Fraction(passed_ms * per_minute, 60_000))
        expected = max(Fraction(0), (needed - left) * 60 / per_minute)
        assert bucket.wait_s(needed) == pytest.approx(float(expected), abs=2e-3)
        bucket.take(amount)
        left -= amount


@PATIENT
@given(per_minute=st.integers(1, 10_000), taken=st.integers(0, 10**6), needed=st.integers(0, 5))
def test_the_wait_told_is_enough_and_no_longer_than_needed(per_minute: int, taken: int, needed: int) -> None:
    now = 0.0
    bucket = Bucket(per_minute, lambda: now)
    bucket.take(taken)
    wait_s = bucket.wait_s(needed)
    if wait_s:
        now = wait_s - 0.01
        assert wait_s < 0.01 or bucket.wait_s(needed) > 0
        now = wait_s
    if needed <= per_minute:
        assert bucket.wait_s(needed) == 0


MOVES = st.lists(
    st.tuples(st.sampled_from(["come", "leave", "fail", "cancel", "pause"]), st.integers(0, 99)), max_size=60
)


@PATIENT
@given(max_running=st.integers(1, 3), max_queued=st.integers(0, 5), num_clients=st.integers(1, 4), moves=MOVES)
def test_whatever_happens_no_place_is_lost_and_none_is_given_twice(
    max_running: int, max_queued: int, num_clients: int, moves: list[tuple[str, int]]
) -> None:
    """Requests come, end, fail and are cancelled in any order, several between two turns of the event loop too."""

    async def main() -> None:
        admission = Admission(max_running, max_queued)
        inside: set[int] = set()
        ends: dict[int, asyncio.Future[None]] = {}
        order: list[int] = []
        tasks: dict[int, asyncio.Task[None]] = {}

        async def request(number: int) -> None:
            async with admission.slot(str(number % num_clients)):
                inside.add(number)
                order.append(number)
                assert len(inside) <= max_running
                try:
                    await ends[number]
                finally:
                    inside.discard(number)

        loop = asyncio.get_running_loop()
        for move, which in moves:
            alive = [number for number, task in tasks.items() if not task.done()]
            if move == "come":
                number = len(tasks)
                ends[number] = loop.create_future()
                tasks[number] = loop.create_task(request(number))
            elif move == "pause":
                for _ in range(which % 4):
                    await asyncio.sleep(0)
                assert admission.running <= max_running
                assert admission.queued <= max_queued
            elif alive:
                number = alive[which % len(alive)]
                if move == "cancel":
                    tasks[number].cancel()
                elif not ends[number].done():
                    if move == "leave":
                        ends[number].set_result(None)
                    else:
                        ends[number].set_exception(ValueError())
        for end in ends.values():
            if not end.done():
                end.set_result(None)
        found = await asyncio.gather(*tasks.values(), return_exceptions=True)
        kinds = Counter(type(each) for each in found)
        assert set(kinds) <= {type(None), RefusedError, ValueError, asyncio.CancelledError}
        assert (admission.running, admission.queued, len(admission._waiting)) == (0, 0, 0)
        for client in range(num_clients):
            own = [number for number in order if number % num_clients == client]
            assert own == sorted(own), "one client's requests run in the order they came"
        admission.check(max_running + max_queued)
        for end in ends.values():
            end.exception() if not end.cancelled() else None

    asyncio.run(main())
