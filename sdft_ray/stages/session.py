"""The Ray session of a run: a cluster that is joined, or a local Ray that is shut down at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray

from sdft_ray.errors import ResourceError
from sdft_ray.generation.engine_folder import remove_abandoned
from sdft_ray.recipe.resources import Resources

T = TypeVar("T")

_LOCAL_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ parts write to our terminal, mostly hints to Ray's own developers
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; saves a process per training
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # one report is taken per look, by default every two seconds
}


_START_ATTEMPTS = 3
_START_HINT = "see gcs_server.err and raylet.err in /tmp/ray/session_latest/logs; the machine may be overloaded"


@dataclass(frozen=True)
class Capacity:
    """What the cluster holds in all, busy or not. `memory_bytes` is main memory that all steps together may take; it is
    infinite where nobody planned, and memory then keeps no step waiting."""

    cpus: float
    gpus: float
    memory_bytes: float = float("inf")
    session: Path | None = None
    """Folder of Ray's session with its logs, as the node of this process calls it; None where nobody told."""


def num_nodes() -> int:
    """Nodes that are up now; of an autoscaled cluster more or fewer than when the session began."""
    return sum(node["Alive"] for node in ray.nodes())


@contextlib.contextmanager
def ray_session(resources: Resources) -> Iterator[Capacity]:
    """Join the Ray at RAY_ADDRESS or the one already started in this process, else start a local one.

    A local Ray takes `resources.cpus`, listens on loopback only, shows no dashboard, and is shut down at the end,
    after Ctrl-C with this process.
    """
    ours, session = not ray.is_initialized(), None
    if ours:
        joining = bool(os.environ.get("RAY_ADDRESS"))
        options: dict[str, Any] = {} if joining else _local_options(resources)
        try:
            with _sigterm_kept():
                session = _init() if joining else retry_start(lambda: _start(options))
        except Exception as reason:  # noqa: BLE001  (Ray raises plain Exception when its processes do not come up)
            why = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
            what = "connect to" if joining else "start"
            hint = "check RAY_ADDRESS, and that the cluster is running" if joining else _START_HINT
            raise ResourceError(f"cannot {what} Ray: {why}", hint) from None
    try:
        total = ray.cluster_resources()
        yield Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), session=session)
    except KeyboardInterrupt:
        # Threads of running steps still talk to Ray: ending it under them can end this process before it says a word.
        # Its own end takes a local Ray along; in a notebook the next run finds that Ray, and what still ran is kept.
        ours = False
        raise
    finally:
        if ours:
            ray.shutdown()
            remove_abandoned()  # engines of steps that were cancelled, whose processes are gone now


def _init(**options: Any) -> Path | None:
    """Start or join; the folder of the session, None for Ray's client, which knows none."""
    # Workers' prints stay in Ray's own log files; what a user should see comes through progress events.
    context: Any = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    folder = getattr(context, "address_info", {}).get("session_dir")
    return Path(folder) if folder else None


def _start(options: dict[str, Any]) -> Path | None:
    with native_errors_muted():
        return _init(**options)


def retry_start(start: Callable[[], T]) -> T:
    """Call what starts Ray on this machine, up to three times if it is too slow: a raylet gives up when the processes
    beside it take more than 15 s, and no setting changes that (ray-project/ray#65983). What one attempt read from disk
    helps the next.
    """
    for _ in range(_START_ATTEMPTS - 1):
        before = set(psutil.Process().children())
        try:
            return start()
        except Exception as reason:
            if "timed out" not in str(reason).lower():
                raise
        _end_rays_own(set(psutil.Process().children()) - before)
    return start()


def _end_rays_own(children: set[psutil.Process]) -> None:
    """Ray leaves what it had started until then, and would end it with this process only."""
    ended = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            if any("/ray/" in part for part in child.cmdline()):
                child.kill()
                ended.append(child)
    psutil.wait_procs(ended, timeout=10)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's own handler, which it sets as it starts, ends this process without a word."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        yield
    finally:
        if before not in (None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def native_errors_muted() -> Iterator[None]:
    """Send file descriptor 2 nowhere for a moment: Ray's C++ part announces its own log level there.

    What goes wrong at the start reaches us as an exception all the same.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _local_options(resources: Resources) -> dict[str, Any]:
    # By way of this process, not of a runtime environment: that would not fit the workers that Ray starts beforehand.
    for name, value in _LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return {
        "address": "local",
        "num_cpus": resources.cpus,
        "object_store_memory": resources.object_store_bytes,
        "include_dashboard": False,
    }
