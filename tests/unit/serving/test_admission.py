"""Budgets fill up evenly; places are handed out by turns, and none is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sdft_ray.serving.access import Key
from sdft_ray.serving.admission import Admission, Bucket, Budgets, RefusedError


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "a", **limits: int) -> Key:
    return Key(id=name, sha256="0" * 64, **limits)  # type: ignore[arg-type]


def test_a_budget_holds_a_minutes_worth_and_no_more() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    clock.now += 3600
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    clock.now += 1
    assert bucket.wait_s(1) == pytest.approx(0)


def test_what_was_overspent_is_waited_for() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(90)
    assert bucket.wait_s(0) == pytest.approx(30)
    clock.now += 12
    assert bucket.wait_s(0) == pytest.approx(18)


def test_a_key_makes_so_many_requests_a_minute() -> None:
    clock = Clock()
    budgets, client = Budgets(clock), key(requests_per_minute=3)
    for _ in range(3):
        budgets.admit(client)
    with pytest.raises(RefusedError, match="requests per minute") as caught:
        budgets.admit(client)
    assert caught.value.retry_after_s == pytest.approx(20)
    clock.now += caught.value.retry_after_s
    budgets.admit(client)
    with pytest.raises(RefusedError):
        budgets.admit(client)


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    budgets, client = Budgets(clock), key(requests_per_minute=1)
    budgets.admit(client)
    for _ in range(100):
        with pytest.raises(RefusedError):
            budgets.admit(client)
    clock.now += 60
    budgets.admit(client)


@pytest.mark.parametrize("spent", [600, 601, 1234, 600_000])
def test_it_goes_again_after_the_seconds_told_and_not_before(spent: int) -> None:
    clock = Clock()
    budgets, client = Budgets(clock), key(tokens_per_minute=600)
    budgets.admit(client)
    budgets.spend(client, spent)
    clock.now += 0.5
    if spent > 605:
        with pytest.raises(RefusedError, match="tokens per minute") as caught:
            budgets.admit(client)
        wait_s = caught.value.retry_after_s
        assert wait_s == pytest.approx((spent - 599) / 10 - 0.5)
        clock.now += wait_s - 0.01
        with pytest.raises(RefusedError):
            budgets.admit(client)
        clock.now += 0.02
    budgets.admit(client)


def test_the_longer_of_two_waits_is_told() -> None:
    clock = Clock()
    budgets, client = Budgets(clock), key(requests_per_minute=1, tokens_per_minute=60)
    budgets.admit(client)
    budgets.spend(client, 150)
    with pytest.raises(RefusedError, match="tokens") as caught:
        budgets.admit(client)
    assert caught.value.retry_after_s == pytest.approx(91)
    clock.now += 45
    with pytest.raises(RefusedError, match="tokens"):
        budgets.admit(client)


def test_keys_do_not_share_budgets_and_those_without_limits_have_none() -> None:
    budgets = Budgets(Clock())
    budgets.admit(key("a", requests_per_minute=1))
    budgets.admit(key("b", requests_per_minute=1))
    for _ in range(1000):
        budgets.admit(key("c"))
        budgets.spend(key("c"), 10**9)
    with pytest.raises(RefusedError):
        budgets.admit(key("a", requests_per_minute=1))
    budgets.admit(key("a", requests_per_minute=2))  # changed in the file: begins afresh


class Crowd:
    """Tasks that hold a place of an `Admission` until they are told to leave."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.admission = Admission(max_running, max_queued)
        self.entered: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str) -> None:
        """Each name begins with its client's letter."""
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold(name))
        await settled()

    async def leave(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
            await settled()

    async def _hold(self, name: str) -> None:
        async with self.admission.slot(name[0]):
            self.entered.append(name)
            await self._leave[name].wait()

    @property
    def counts(self) -> tuple[int, int]:
        return self.admission.running, self.admission.queued


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_no_more_run_than_may_and_those_of_one_client_in_order() -> None:
    async def main() -> None:
        crowd = Crowd(2, 10)
        await crowd.come("a1", "a2", "a3", "a4", "a5")
        assert crowd.entered == ["a1", "a2"]
        assert crowd.counts == (2, 3)
        await crowd.leave("a2")
        assert crowd.entered == ["a1", "a2", "a3"]
        await crowd.leave("a1", "a3", "a4")
        assert crowd.entered == ["a1", "a2", "a3", "a4", "a5"]
        await crowd.leave("a5")
        assert crowd.counts == (0, 0)

    asyncio.run(main())


def test_clients_take_turns() -> None:
    async def main() -> None:
        crowd = Crowd(1, 10)
        await crowd.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        for name in ("a1", "a2", "b1", "c1", "a3", "b2", "a4"):
            assert crowd.entered[-1] == name
            await crowd.leave(name)

    asyncio.run(main())


def test_a_thousand_requests_of_one_client_hold_up_another_by_one_turn() -> None:
    async def main() -> None:
        crowd = Crowd(1, 2000)
        await crowd.come("a", *(f"a{i}" for i in range(1000)), "b")
        await crowd.leave("a", "a0")
        assert crowd.entered == ["a", "a0", "b"]
        for task in crowd.tasks.values():
            task.cancel()
        await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
        assert crowd.counts == (0, 0)

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    async def main() -> None:
        crowd = Crowd(1, 2)
        await crowd.come("a1", "a2", "a3", "b1")
        assert crowd.counts == (1, 2)
        with pytest.raises(RefusedError, match="the queue is full") as caught:
            await crowd.tasks["b1"]
        assert caught.value.retry_after_s >= 1
        with pytest.raises(RefusedError):
            crowd.admission.check()
        await crowd.leave("a1")
        crowd.admission.check()
        with pytest.raises(RefusedError):
            crowd.admission.check(2)
        await crowd.leave("a2", "a3")
        crowd.admission.check(3)
        with pytest.raises(RefusedError):
            crowd.admission.check(4)

    asyncio.run(main())


def test_without_a_queue_nobody_waits() -> None:
    async def main() -> None:
        crowd = Crowd(1, 0)
        await crowd.come("a1", "a2")
        with pytest.raises(RefusedError):
            await crowd.tasks["a2"]
        await crowd.leave("a1")
        await crowd.come("a3")
        assert crowd.entered == ["a1", "a3"]
        await crowd.leave("a3")

    asyncio.run(main())


def test_who_gives_up_waiting_leaves_no_hole() -> None:
    async def main() -> None:
        crowd = Crowd(1, 10)
        await crowd.come("a1", "a2", "b1", "a3")
        crowd.tasks["a2"].cancel()
        crowd.tasks["b1"].cancel()
        await settled()
        assert crowd.counts == (1, 1)
        await crowd.leave("a1")
        assert crowd.entered == ["a1", "a3"]
        await crowd.leave("a3")
        assert crowd.counts == (0, 0)

    asyncio.run(main())


def test_a_place_that_comes_at_the_moment_its_client_leaves_goes_on_to_the_next() -> None:
    async def main() -> None:
        for cancel_first in (True, False):
            crowd = Crowd(1, 10)
            await crowd.come("a1", "a2", "a3")
            acts: list[Callable[[], Any]] = [crowd.tasks["a2"].cancel, crowd._leave["a1"].set]
            for act in acts if cancel_first else reversed(acts):
                act()
                if not cancel_first:
                    await asyncio.sleep(0)  # a1 leaves and hands its place to a2, which has not woken up yet
            await settled()
            assert crowd.entered == ["a1", "a3"]
            await crowd.leave("a3")
            assert crowd.counts == (0, 0)

    asyncio.run(main())


def test_an_error_frees_the_place() -> None:
    async def main() -> None:
        admission = Admission(1, 0)

        async def fails(reason: BaseException) -> None:
            async with admission.slot("a"):
                raise reason

        async def expect(work: Awaitable[None], kind: type[BaseException]) -> None:
            with pytest.raises(kind):
                await work

        await expect(fails(ValueError()), ValueError)
        await expect(fails(asyncio.CancelledError()), asyncio.CancelledError)
        assert (admission.running, admission.queued) == (0, 0)
        async with admission.slot("a") as waited_s:
            assert waited_s < 1

    asyncio.run(main())
