"""A service on this machine, on a Ray of its own or on the one it is part of, until it is told to stop."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from sdft_ray.errors import ServeError
from sdft_ray.recipe.resources import Resources
from sdft_ray.serving.access import key_ring
from sdft_ray.serving.front import Door, drain, environment
from sdft_ray.serving.settings import ServeSettings
from sdft_ray.serving.sources import locate
from sdft_ray.store.store import Store

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # by default 15: whatever else runs here would come before who waits for an answer
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # by default 0.1, for which it uses 3 % of a core
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
}


def closed(settings: ServeSettings, door: Door) -> ServeSettings:
    """The settings with loopback open to anyone on it, unless there are keys, or a file that may get some.

    Raises `ServeError` for a service beyond loopback that has neither keys nor leave to do without.
    """
    access = settings.access
    if key_ring(access).keys or access.allow_anonymous or (access.keys_file and door.is_loopback):
        return settings
    if not door.is_loopback:
        raise ServeError(
            f"{door.host} can be reached by others, and there are no keys",
            "make some with `sdft keys new` and give --keys FILE, or say --allow-anonymous",
        )
    local = access.model_copy(update={"allow_anonymous": True, "local_hosts_only": True})
    return settings.model_copy(update={"access": local})


def check(settings: ServeSettings, door: Door) -> ServeSettings:
    """Everything that can be known to be wrong before a process starts. Raises `UserError`."""
    door.check()
    settings = closed(settings, door)
    store = Store(settings.store or ".sdft")
    for model in settings.models:
        locate(model.source, store)
        if model.draft is not None:
            locate(model.draft.source, store)
    return settings


@contextmanager
def service(settings: ServeSettings, door: Door, resources: Resources) -> Iterator[None]:
    """Serve while the context lasts; then no new request is taken and those under way are finished.

    Raises `UserError` for what cannot work, before anything starts where it can be known.
    """
    settings = check(settings, door)
    folder = Path(tempfile.mkdtemp(prefix="sdft-"))
    try:
        os.environ.update(environment(door, folder, drain_s=settings.replicas.drain_s))
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _running(settings, door, resources):
            yield
            if not drain(folder, settings.replicas.drain_s):
                log.warning("some requests were not done after %g s", settings.replicas.drain_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(settings: ServeSettings, door: Door, resources: Resources) -> Iterator[None]:
    from ray import serve  # after the environment is set: Ray Serve reads it at import
    from ray.serve.schema import LoggingConfig

    from sdft_ray.serving.deploy import APPLICATION, application
    from sdft_ray.stages.session import native_errors_muted, ray_session

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ExitStack() as ending:
        ending.enter_context(ray_session(resources))
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(http_options={"host": "127.0.0.1", "port": door.port}, logging_config=quiet)
        try:
            serve.run(application(settings), name=APPLICATION, route_prefix="/", blocking=False, logging_config=quiet)
        except RuntimeError as reason:
            raise ServeError(f"the service does not come up: {_cause(reason)}", "see the log of the replica") from None
        try:
            yield
        finally:
            # Ray's last words are about actors that were killed as they should be.
            with native_errors_muted(), redirect_stdout(io.StringIO()):
                serve.shutdown()
                ending.close()


def _cause(reason: RuntimeError) -> str:
    """What the replica said, out of Ray Serve's account of it."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason is given"])[-1]
