"""Figures of a running generation for Prometheus. Ray's agent on the driver's node exports them under `ray_sdft_*`."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

_TAGS = ("recipe",)


class GenerationMetrics:
    """Counters of rows and tokens since the driver started; gauges of what is left and of the pool."""

    def __init__(self, recipe: str) -> None:
        self._rows = Counter("sdft_generate_rows", "Rows answered", _TAGS)
        self._failed = Counter("sdft_generate_failed_rows", "Rows that failed", _TAGS)
        self._tokens = Counter("sdft_generate_response_tokens", "Tokens sampled", _TAGS)
        self._left = Gauge("sdft_generate_rows_left", "Rows without an answer", _TAGS)
        self._actors = Gauge("sdft_generate_actors", "Actors that answered within a minute", _TAGS)
        for metric in (self._rows, self._failed, self._tokens, self._left, self._actors):
            metric.set_default_tags({"recipe": recipe})

    def count(self, rows: int, failed: int, tokens: int) -> None:
        """Add what one receipt reports."""
        for counter, value in ((self._rows, rows), (self._failed, failed), (self._tokens, tokens)):
            if value:  # a counter refuses to grow by nothing
                counter.inc(value)

    def level(self, left: int, actors: int) -> None:
        """Set what is left to do and how many actors do it."""
        self._left.set(left)
        self._actors.set(actors)
