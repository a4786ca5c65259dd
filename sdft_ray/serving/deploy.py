"""The Ray Serve deployment. Its replicas hold the engines and serve HTTP themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import REGISTRY
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig
from ray.util.metrics import Counter, Gauge, Histogram

from sdft_ray.engines.request import Engine, GenerationRequest
from sdft_ray.errors import ModelError
from sdft_ray.models.precision import EngineUse
from sdft_ray.serving.access import check_access, key_ring
from sdft_ray.serving.admission import Admission
from sdft_ray.serving.http import build_app
from sdft_ray.serving.metrics import ALL, SECONDS, Metric
from sdft_ray.serving.service import LoadedModel, Service
from sdft_ray.serving.settings import ServedModel, ServeSettings
from sdft_ray.serving.sources import locate
from sdft_ray.store.store import Store

log = logging.getLogger(__name__)

APPLICATION = "sdft"


@serve.ingress()
class ModelService:
    """One replica: the engines of all models, and the HTTP application over them."""

    async def __init__(self, plain: dict[str, Any]) -> None:
        self._settings = ServeSettings.parse(plain, "the settings of the service")
        self._keys = key_ring(self._settings.access)
        store = Store(self._settings.store or ".sdft")
        self._models: dict[str, LoadedModel] = {}
        for model in self._settings.models:
            self._models[model.name] = await self._load(model, store)
        self._service = Service(self._models, self._settings.limits)

    async def _load(self, model: ServedModel, store: Store) -> LoadedModel:
        """Locate, check and start one model, and let it generate a token."""
        from sdft_ray.data.chat import ChatFormat, load_tokenizer

        began = time.monotonic()
        located = locate(model.source, store)
        check_end = time.monotonic()
        draft = None
        if model.draft is not None:
            draft = (locate(model.draft.source, store).directory, model.draft.num_tokens)
        cpus = self._settings.replicas.cpus / len(self._settings.models)
        engine: Engine = start_engine(model, located.directory, draft, cpus)
        engine_end = time.monotonic()
        tokenizer: Any = load_tokenizer(located.directory)
        try:
            chat = ChatFormat(tokenizer)
        except ModelError:
            chat = None
        await _answer_once(engine)
        answer_end = time.monotonic()
        phases = {
            "check_s": check_end - began,
            "engine_s": engine_end - check_end,
            "first_token_s": answer_end - engine_end,
        }
        log.info("model %s is ready: %s", model.name, phases)
        limits = self._settings.limits
        admission = Admission(limits.max_running, limits.max_queued)
        name = (located.address or str(located.directory)).rpartition("/")[2]
        draft_facts = {"draft": model.draft.source, "num_draft_tokens": model.draft.num_tokens} if model.draft else {}
        precision = engine.precision
        used = EngineUse(model.engine.kind, precision).to_json() if precision else {}
        facts = {**located.facts, "address": located.address, **draft_facts, "engine": used, "cold_start": phases}
        return LoadedModel(model.name, engine, tokenizer, chat, admission, f"fp_{name}", int(time.time()), facts)

    def engines(self) -> dict[str, dict[str, str]]:
        """By name of the model: what runs it, for people (`EngineUse.to_json`)."""
        return {name: model.facts["engine"] for name, model in self._models.items() if model.facts["engine"]}

    async def __serve_build_asgi_app__(self) -> Any:
        # The default registry, because it also has vLLM's own metrics.
        return build_app(self._service, self._keys, self._settings, REGISTRY, [RaySink()])

    def check_health(self) -> None:
        """Ray Serve restarts a replica for which this raises."""
        for model in self._models.values():
            model.engine.check()

    def __del__(self) -> None:
        """All engines at once: each may take some seconds to end its processes."""
        engines = [model.engine for model in getattr(self, "_models", {}).values()]
        with ThreadPoolExecutor(max(1, len(engines))) as threads:
            list(threads.map(lambda engine: engine.close(), engines))


class RaySink:
    """Metrics through Ray's agents, which Prometheus can scrape on every node of a cluster."""

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        for metric in ALL:
            if metric.kind == "histogram":
                created: Any = Histogram(metric.name, metric.help, boundaries=list(SECONDS), tag_keys=metric.labels)
            else:
                created = (Counter if metric.kind == "counter" else Gauge)(
                    metric.name, metric.help, tag_keys=metric.labels
                )
            self._series[metric.name] = created

    def put(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """See `Sink.put`."""
        series = self._series[metric.name]
        if metric.kind == "counter":
            if value:  # Ray rejects an increment of 0
                series.inc(value, tags=labels)
        elif metric.kind == "gauge":
            series.set(value, tags=labels)
        else:
            series.observe(value, tags=labels)


def start_engine(model: ServedModel, directory: Any, draft: Any, cpus: float) -> Engine:
    """Start the engine that a model's settings name."""
    if model.engine.kind == "transformers":
        from sdft_ray.engines.transformers import TransformersEngine

        return TransformersEngine.start(directory, model.engine)
    from sdft_ray.engines.vllm import VllmEngine

    return VllmEngine.start(directory, model.engine, draft, cpus)


async def _answer_once(engine: Engine) -> None:
    """Generate one token. Raises `ModelError` if that takes more than two minutes."""
    try:
        async with asyncio.timeout(120):
            async for _ in engine.answer(GenerationRequest(prompt_ids=(0,), max_tokens=1, temperature=0.0)):
                pass
    except TimeoutError:
        raise ModelError("the engine generates no token within two minutes") from None


def application(settings: ServeSettings) -> serve.Application:
    """The Ray Serve application of these settings."""
    replicas, limits = settings.replicas, settings.limits
    scaling: dict[str, Any] = {"num_replicas": replicas.max}
    if replicas.min != replicas.max:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min,
                max_replicas=replicas.max,
                target_ongoing_requests=replicas.target_ongoing,
                upscale_delay_s=replicas.scale_up_after_s,
                downscale_delay_s=replicas.scale_down_after_s,
            )
        }
    actor: dict[str, Any] = {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus}
    if replicas.accelerator_type:
        actor["accelerator_type"] = replicas.accelerator_type
    deployment: Any = serve.deployment(
        ModelService,
        name="models",
        ray_actor_options=actor,
        max_ongoing_requests=4 * (limits.max_running + limits.max_queued),
        graceful_shutdown_timeout_s=replicas.drain_s,
        max_surge_percent=100 if replicas.surge else 0,
        health_check_period_s=5,
        logging_config=LoggingConfig(enable_access_log=False),
        **scaling,
    )
    return deployment.bind(settings.model_dump(mode="json"))


def build(args: dict[str, Any]) -> serve.Application:
    """Application builder for `serve deploy serve/config.yaml`: `args` are the `args` in that file.

    Raises `ServeError` for invalid settings, and for settings with neither keys nor `allow_anonymous`.
    """
    settings = ServeSettings.parse(args, "args in the Serve config")
    check_access(settings.access)
    return application(settings)
