"""How fast a stage is, how long it will take, and how both are written."""

from __future__ import annotations

from collections import deque

WINDOW_S = 45.0
"""A rate is the slope over the last so many seconds: steady, yet it follows a stage that changes its speed."""
MIN_SAMPLES = 4
MIN_SPAN_S = 2.0
"""A rate and the remaining time are shown once there are this many updates over this many seconds."""


class Pace:
    """Recent updates of a stage, and the rate that follows from them."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now: float, done: int | None, phase: str = "") -> None:
        """Note how much is done at a time. A phase before anything was done, such as a start, takes no part.

        One update from before the window stays as the point to measure from: without it, updates that come in bursts
        would give the rate inside of a burst.
        """
        if phase or done is None:
            if self._samples and self._samples[0][1] == self._samples[-1][1]:
                self._samples.clear()
            return
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # a worker restarted from an earlier point
        self._samples.append((now, done))
        while len(self._samples) > MIN_SAMPLES and now - self._samples[1][0] > WINDOW_S:
            self._samples.popleft()

    def rate(self, now: float, min_span_s: float = MIN_SPAN_S) -> float | None:
        """Units per second; None while there are too few updates. Falls when updates stop arriving."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        (first, done_first), (last, done_last) = self._samples[0], self._samples[-1]
        span = last - first
        if span < min_span_s or done_last <= done_first:
            return None
        interval = span / (len(self._samples) - 1)
        overdue = max(0.0, now - last - 3 * interval)
        return (done_last - done_first) / (span + overdue)


def seconds_left(done: int | None, total: int | None, rate: float | None) -> float | None:
    """Time that the rest takes at this rate; None where one of the three is unknown or nothing is left."""
    if not rate or not total or done is None or done >= total:
        return None
    return (total - done) / rate


def rate_text(rate: float) -> str:
    """1.5/s, or per minute or hour where that is easier to read."""
    for per, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * per >= 0.1 or unit == "h":
            break
    digits = 0 if rate * per >= 100 else 1
    return f"{rate * per:,.{digits}f}/{unit}"


def whole(count: int) -> str:
    """28,000, but 12.35M: short enough for two numbers in one column."""
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:,.2f}M"


def clock_time(value_s: float) -> str:
    """0:07, 12:34, 1:02:03; beyond 99 hours in whole days."""
    rounded = int(value_s + 0.5)
    if rounded >= 360_000:
        return f"{rounded // 86_400} d"
    minutes, rest = divmod(rounded, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value_s: float) -> str:
    """0.4 s, 12.3 s, 2 min 5 s, 1 h 2 min."""
    if value_s < 59.95:
        return f"{value_s:.1f} s"
    minutes, rest = divmod(round(value_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
