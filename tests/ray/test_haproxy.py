"""`sdft serve` on a release of Ray whose HAProxy configuration cannot be hardened: it says why it does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.haproxy import free_ports, has_haproxy

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not has_haproxy(), reason="HAProxy is installed with Ray on Linux"),
]

OTHER_RAY = """
import importlib.abc, importlib.util, sys

NAME = "ray.serve._private.haproxy_templates"

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            before = module.HAPROXY_CONFIG_TEMPLATE
            module.HAPROXY_CONFIG_TEMPLATE = before.replace("mode 666", "mode 660")
            assert module.HAPROXY_CONFIG_TEMPLATE != before

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""Python imports it at start-up, in Ray's processes as well: another release, in which one pattern has a new form."""


def test_a_service_whose_haproxy_cannot_be_hardened_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_RAY, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    (port,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "sdft_ray.cli", "serve", str(TEACHER), "--engine", "transformers", "--port", str(port)],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": paths},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "HAProxy is not started" in done.stderr
    assert "only its owner can open the admin socket" in done.stderr
    assert "install the release of Ray" in done.stderr
    assert "Ready at" not in done.stdout
