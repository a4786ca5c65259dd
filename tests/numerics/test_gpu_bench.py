"""The GPU benchmark on a CPU: all of its code runs, with nothing but torch and transformers to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.documents import ROOT

pytestmark = pytest.mark.slow

BLOCKED = (
    "ray",
    "vllm",
    "lm_eval",
    "datasets",
    "peft",
    "pyarrow",
    "pandas",
    "typer",
    "rich",
    "scipy",
    "sklearn",
    "fastapi",
)
SCRIPT = f"""
import runpy, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
bench = runpy.run_path("jobs/bench/gpu.py", run_name="bench")
bench["main"]([])
bench["main"](["--cpu", "--tiny"], lambda sizes, recomputes: 2 * 10**9 if recomputes else 10**9)
"""


@pytest.fixture(scope="module")
def told() -> list[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_card_it_says_so_and_ends_well(told: list[str]) -> None:
    assert told[0] == "There is no GPU that torch can use, so nothing was measured."
    result = json.loads(told[1])
    assert (result["benchmark"], result["ratio"]) == ("gpu", None)
    assert "no GPU" in result["reason"]


def test_every_part_has_its_figures(told: list[str]) -> None:
    result: dict[str, Any] = json.loads(told[-1])
    assert result["ratio"] is None, "a CPU's figure is no card's"
    assert result["card"]["name"].startswith("CPU")
    assert result["measuring"]["ratio"] > 0
    assert set(result["losses"]) == {"cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon"}
    for loss in result["losses"].values():
        assert 0 < loss["error"] < 0.02, "bfloat16 keeps eight bits"
    kept, recomputed = (result["training"][name] for name in ("kept", "recomputed"))
    assert kept["loss"] == pytest.approx(recomputed["loss"], rel=1e-3), "recomputing changes no gradient"
    for run, predicted in ((kept, 10**9), (recomputed, 2 * 10**9)):
        assert run["tokens_per_s"] > 0
        assert run["share_of_matmul"] > 0
        assert run["mfu"] is None, "no data sheet knows this"
        assert run["predicted_over_measured"] == predicted / run["peak_bytes"]
