"""The laboratory recipe as a Ray job on a cluster of three nodes with a shared store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.lab.export import export
from sdft_ray.pipeline.run import Run
from sdft_ray.progress import parse_event
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import dump_yaml
from sdft_ray.store.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]

RESOURCES = {
    "generate": {"cpus": 0.8, "resources": {"generation": 0.1}},
    "train": {"cpus": 0.5, "num_workers": 2, "resources": {"training": 0.1}},
    # Engines that wait for the next model sit where training has to be, and must make room though other nodes are free.
    # Those of vLLM would cost half a minute each to start, and this test is about nodes.
    "evaluate": {"sampler": "transformers", "resources": {"training": 0.1}},
}


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the job server of three nodes, in a process of their own: this one may have a Ray already."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # The cluster's `python` is the one that has the package, as in a container.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_three_nodes, args=(theirs,))
    process.start()
    try:
        assert ours.poll(300), "the cluster did not start"
        yield ours.recv()
    finally:
        ours.send("end")
        process.join(120)
        assert process.exitcode == 0


def _three_nodes(pipe: Connection) -> None:
    """Head, a node for generation and a node for training, until a message comes."""
    from tests.support.nodes import Cluster

    memory = 100 * 2**20
    cluster = Cluster()
    try:
        # Another Ray on this machine may have the port that job agents listen on unless another is named; without
        # one, the head takes no jobs.
        ports: dict[str, Any] = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}
        head = cluster.add_node(
            num_cpus=1, object_store_memory=memory, include_dashboard=True, dashboard_host="127.0.0.1", **ports
        )
        cluster.add_node(num_cpus=1, object_store_memory=memory, resources={"generation": 1})
        cluster.add_node(num_cpus=1, object_store_memory=memory, resources={"training": 1})
        pipe.send(f"http://{head.webui_url}")
        pipe.recv()
    finally:
        cluster.shutdown()


def test_submitted_recipe_runs_across_nodes(dashboard: str, tmp_path: Path) -> None:
    lab = export(tmp_path / "lab")
    recipe = Recipe.load(lab / "quickstart.yaml").model_dump(mode="json", exclude_defaults=True)
    recipe["name"] = "lab-on-three-nodes"
    recipe["seed_set"]["limit"] = 48
    recipe["evaluate"]["limit"] = 8
    recipe["train"]["num_steps"] = 4
    recipe["speed"] = {"rounds": 1, "new_tokens": 8}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    (tmp_path / "resources.yaml").write_text(dump_yaml(RESOURCES), encoding="utf-8")
    store = str(tmp_path / "store")
    command = ["submit", str(tmp_path / "recipe.yaml"), "--address", dashboard, "--store", store]
    command += ["--resources", str(tmp_path / "resources.yaml"), "--progress", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "sdft_ray.cli", *command], capture_output=True, text=True, check=False, timeout=1000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [event for event in map(parse_event, done.stdout.splitlines()) if event]
    finished = {event.stage for event in events if event.event == "stage_finished"}
    run = Run.open(Store(store), "lab-on-three-nodes")
    assert finished == {stage["name"] for stage in run.stages()}
    assert any(event.event == "progress" and event.stage == "generate" for event in events)
    (generation,) = run.manifests["generate"].summary["nodes"]
    assert {run.manifests[f"train:{arm}"].summary["node"] for arm in ("sft", "sdft")} != {generation}
    assert run.manifests["generate"].summary["num_rows"] == 48
