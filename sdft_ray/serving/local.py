"""`sdft serve`: run the service from this machine, on a local Ray or on the cluster that this machine belongs to."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sdft_ray.errors import ServeError
from sdft_ray.models.precision import EngineUse
from sdft_ray.progress import libraries_to
from sdft_ray.recipe.resources import Resources
from sdft_ray.serving.access import key_ring
from sdft_ray.serving.failures import start_error
from sdft_ray.serving.haproxy import ListenAddress, drain, environment, refusal
from sdft_ray.serving.settings import ServeSettings
from sdft_ray.serving.sources import locate
from sdft_ray.store.store import Store

log = logging.getLogger(__name__)

_TOLD_WITHIN_S = 60.0

_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # default 15, which lets any other process delay answers
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # default 0.1, which costs 3 % of a core
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
}


def secured(settings: ServeSettings, address: ListenAddress) -> ServeSettings:
    """The settings, with anonymous access allowed if the service listens on loopback and no keys are configured.

    Raises `ServeError` if other machines can reach the service and it has neither keys nor `allow_anonymous`.
    """
    access = settings.access
    if key_ring(access).keys or access.allow_anonymous or (access.keys_file and address.is_loopback):
        return settings
    if not address.is_loopback:
        raise ServeError(
            f"other machines can reach {address.host}, and no API keys are configured",
            "create a key with `sdft keys new NAME` and give --keys FILE, or give --allow-anonymous",
        )
    local = access.model_copy(update={"allow_anonymous": True, "local_hosts_only": True})
    return settings.model_copy(update={"access": local})


def check(settings: ServeSettings, address: ListenAddress) -> ServeSettings:
    """Fail-fast checks that run before any process starts. Raises `UserError`."""
    address.check()
    settings = secured(settings, address)
    store = Store(settings.store or ".sdft")
    for model in settings.models:
        locate(model.source, store)
        if model.draft is not None:
            locate(model.draft.source, store)
    return settings


Engines = dict[str, EngineUse]
"""By name of the model; models of a service without a replica are left out."""


@contextmanager
def service(settings: ServeSettings, address: ListenAddress, resources: Resources) -> Iterator[Engines]:
    """Serve inside the context, and say by which engines. At its end no new requests are accepted, and those in flight
    are finished.

    Raises `UserError`, before any process starts where the mistake can be found by then.
    """
    settings = check(settings, address)
    folder = Path(tempfile.mkdtemp(prefix="sdft-"))
    try:
        os.environ.update(environment(address, folder, drain_s=settings.replicas.drain_s))
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _running(settings, address, resources, folder) as engines:
            yield engines
            if not drain(folder, settings.replicas.drain_s):
                log.warning("some requests were still unfinished after %g s", settings.replicas.drain_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(settings: ServeSettings, address: ListenAddress, resources: Resources, folder: Path) -> Iterator[Engines]:
    from ray import serve  # after the environment is set: Ray Serve reads it at import
    from ray.exceptions import RayError
    from ray.serve.schema import LoggingConfig

    from sdft_ray.serving.deploy import APPLICATION, application
    from sdft_ray.stages.session import ray_session

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    log, began = Store(settings.store or ".sdft").log_path("serve"), time.time()
    with ExitStack() as ending:
        with libraries_to(log):
            capacity = ending.enter_context(ray_session(resources))
            quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": address.port}, logging_config=quiet)
                handle: Any = serve.run(
                    application(settings), name=APPLICATION, route_prefix="/", blocking=False, logging_config=quiet
                )
                told = handle.engines.remote().result(timeout_s=_TOLD_WITHIN_S) if settings.replicas.min else {}
            except (RuntimeError, TimeoutError, RayError) as reason:
                raise refusal(folder) or start_error(str(reason), capacity.session, began, log) from None
        try:
            yield {name: EngineUse.from_json(engine) for name, engine in told.items()}
        finally:
            with libraries_to(log):  # Ray reports actors that were killed on purpose as errors
                serve.shutdown()
                ending.close()
