"""A local Ray on a machine that is too busy for Ray's own limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly]  # it waits for 40 s

ROOT = Path(__file__).parents[2]

SLOW_ONCE = """
import os, sys, time

if any("dashboard/agent.py" in part for part in sys.orig_argv):
    try:
        os.close(os.open(os.environ["SLOW_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        time.sleep(25)
"""
"""What Python runs first: the process that a raylet waits 15 seconds for takes longer, the first time."""

START = """
import json, psutil, signal
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.session import ray_session

signal.signal(signal.SIGTERM, ours := lambda *_: None)
with ray_session(Resources(cpus=2, object_store_bytes=100 * 2**20)) as capacity:
    kept = signal.getsignal(signal.SIGTERM) is ours
    own = [child.cmdline() for child in psutil.Process().children()]
left = [child.cmdline() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
servers = [command for command in own if command and command[0].endswith("gcs_server")]
print(json.dumps({"cpus": capacity.cpus, "servers": len(servers), "left": left, "kept": kept}))
"""


def test_a_start_that_was_too_slow_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_ONCE, encoding="utf-8")
    mark = tmp_path / "was slow"
    changed = {"HOME": str(tmp_path), "SLOW_ONCE": str(mark), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", START]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **changed}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert mark.exists(), "nothing was slow"
    assert json.loads(done.stdout.splitlines()[-1]) == {"cpus": 2, "servers": 1, "left": [], "kept": True}
