"""The service's metrics for Prometheus: at `/metrics` of a replica, and through Ray's agents on a cluster.

Names and labels are defined here; `cluster/dashboards/serving.json` is a Grafana dashboard for them. Labels never hold
text from a client: an unknown model or path is counted with the label "".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sdft_ray.serving.service import Call

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    help: str
    labels: tuple[str, ...]
    kind: Literal["counter", "gauge", "histogram"] = "counter"


REQUESTS = Metric("sdft_serve_requests", "finished requests, by status", ("model", "path", "status"))
TOKENS = Metric("sdft_serve_tokens", "tokens of prompts and answers", ("model", "kind"))
DRAFTED = Metric("sdft_serve_draft_tokens", "tokens proposed by a draft model, accepted or rejected", ("model", "kind"))
SECONDS_TAKEN = Metric("sdft_serve_request_seconds", "from arrival to the last byte", ("model",), "histogram")
FIRST_TOKEN = Metric("sdft_serve_first_token_seconds", "from arrival to the first token", ("model",), "histogram")
WAITED = Metric("sdft_serve_wait_seconds", "time in the queue", ("model",), "histogram")
RUNNING = Metric("sdft_serve_running", "answers being generated", ("model",), "gauge")
QUEUED = Metric("sdft_serve_queued", "answers waiting for a slot", ("model",), "gauge")
ALL = (REQUESTS, TOKENS, DRAFTED, SECONDS_TAKEN, FIRST_TOKEN, WAITED, RUNNING, QUEUED)


class Sink(Protocol):
    """A destination of metrics."""

    def put(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Add to a counter, set a gauge, or observe a histogram."""
        ...


class PrometheusSink:
    """Metrics of this process, in a registry of the Prometheus client."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._series: dict[str, Any] = {}
        for metric in ALL:
            if metric.kind == "histogram":
                created: Any = Histogram(metric.name, metric.help, metric.labels, buckets=SECONDS, registry=registry)
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                created = kind(metric.name, metric.help, metric.labels, registry=registry)
            self._series[metric.name] = created

    def put(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """See `Sink.put`."""
        series = self._series[metric.name].labels(**labels)
        act: Callable[[float], None] = getattr(series, _ACTS[metric.kind])
        act(value)


_ACTS = {"counter": "inc", "gauge": "set", "histogram": "observe"}


class Meters:
    """Writes metrics to all sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def finished(self, path: str, model: str, status: int, took_s: float, call: Call) -> None:
        """Count a finished request. `path` and `model` are known names, or "" for an unknown one."""
        labels = {"model": model}
        self._put(REQUESTS, 1, {**labels, "path": path, "status": str(status)})
        if not model:
            return
        self._put(SECONDS_TAKEN, took_s, labels)
        if call.num_answer:
            self._put(TOKENS, call.num_prompt, {**labels, "kind": "prompt"})
            self._put(TOKENS, call.num_answer, {**labels, "kind": "answer"})
            self._put(WAITED, call.waited_s, labels)
        if call.num_proposed:
            self._put(DRAFTED, call.num_accepted, {**labels, "kind": "accepted"})
            self._put(DRAFTED, call.num_proposed - call.num_accepted, {**labels, "kind": "rejected"})
        if call.first_token_s is not None:
            self._put(FIRST_TOKEN, call.first_token_s, labels)

    def load(self, model: str, running: int, queued: int) -> None:
        """Set the gauges of a model's load."""
        self._put(RUNNING, running, {"model": model})
        self._put(QUEUED, queued, {"model": model})

    def _put(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        for sink in self._sinks:
            sink.put(metric, value, labels)
