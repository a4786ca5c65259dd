"""The pool of sampler actors: it follows the cluster up and down, and never waits for itself.

Each test runs in a process of its own: Ray Data keeps handles of its helpers over `ray.shutdown`, so a second Ray in
one process finds actors that are gone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from sdft_ray.recipe.resources import Resources
from sdft_ray.stages import generate
from sdft_ray.stages.session import ray_session
from sdft_ray.store import files
from sdft_ray.store.store import Store
from tests.support.fork_server import ForkServer
from tests.support.generation_job import farm_rows, make_job
from tests.support.nodes import Cluster
from tests.support.processes import ray_processes
from tests.support.staged import output_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MEMORY = 80 * 2**20
NIGHTLY = pytest.mark.nightly


def _pool_size() -> int:
    """Sampler actors that run on this machine under this process's Ray."""
    return len(ray_processes("MapWorker"))


@contextmanager
def _cluster() -> Iterator[Cluster]:
    """A head with one CPU; more nodes may join."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _in_a_fresh_process(forks: ForkServer | None, function: Callable[..., None], *arguments: object) -> None:
    """With an environment of its own: the Ray of this process may be running."""
    with tempfile.TemporaryDirectory() as home, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", home)
            patch.setenv("RAY_AUTH_MODE", "disabled")
            if forks is not None:
                patch.setenv("PYTHONPATH", forks.environment()["PYTHONPATH"])
            running = executor.submit(function, *arguments)  # starts the process
        running.result()


@pytest.mark.nightly
def test_the_pool_grows_when_a_node_joins_and_shrinks_at_the_end_of_the_work(tmp_path: Path) -> None:
    """Without forks, which are no children of the process that counts them."""
    _in_a_fresh_process(None, _grow_and_shrink, tmp_path)


def _grow_and_shrink(folder: Path) -> None:
    part = {"sampler": "scripted", "cpus": 0.9, "max_actors": 2, "scripted_delay_s": 0.01, "chunks_in_flight": 1}
    resources = Resources.model_validate({"generate": part})
    job = make_job(Store(str(folder)), resources, farm_rows(9_000))
    sizes: list[int] = []
    with _cluster() as cluster, ThreadPoolExecutor(1) as thread:
        running = thread.submit(generate.run, job)
        while not running.done():
            time.sleep(0.5)
            sizes.append(_pool_size())
            if sizes.count(1) == 10 and sizes[-1] == 1:
                cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        made = running.result()
        end = time.monotonic() + 120
        while _pool_size() and time.monotonic() < end:
            time.sleep(0.5)
        assert _pool_size() == 0
    assert len(made.summary["nodes"]) == 2
    assert max(sizes) == 2
    assert set(sizes[: sizes.index(2)]) <= {0, 1}
    table = pq.read_table(output_of(job) / files.GENERATED)
    assert table["example_id"].to_pylist() == [f"row-{n}" for n in range(9_000)]
    log = (output_of(job) / files.PROGRESS).read_text().splitlines()
    assert {1, 2} <= {json.loads(line)["actors"] for line in log}


@pytest.mark.parametrize("cpus", [pytest.param(1, marks=NIGHTLY), 2, pytest.param(4, marks=NIGHTLY)])
def test_no_deadlock(cpus: int, tmp_path: Path, forks: ForkServer) -> None:
    """With the default share of a CPU per actor, and as many actors asked for as could never fit."""
    _in_a_fresh_process(forks, _generate, cpus, tmp_path)


def _generate(cpus: int, folder: Path) -> None:
    part = {"sampler": "scripted", "max_actors": 8}
    resources = Resources.model_validate({"cpus": cpus, "object_store_bytes": MEMORY, "generate": part})
    job = make_job(Store(str(folder)), resources, farm_rows(2_000))
    with ray_session(resources):
        assert generate.run(job).summary["num_rows"] == 2_000
