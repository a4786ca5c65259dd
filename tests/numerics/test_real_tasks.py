"""The leaderboard's tasks on real questions in local files, item by item as plain lm-eval; and awkward task files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.evaluation.recovery import recovery
from sdft_ray.statistics.scores import Scores
from tests.support.asking import evaluate
from tests.support.real import REAL, needs_real_data, real
from tests.support.tiny import make_model

pytestmark = [pytest.mark.slow, needs_real_data]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("tasks", "num_items"),
    [
        (["truthfulqa_mc2", "gsm8k"], 2 * 3),
        pytest.param(["arc_challenge", "hellaswag", "winogrande", "mmlu"], 3 * 3 + 57, marks=pytest.mark.nightly),
    ],
)
def test_a_few_items_as_plain_lm_eval(tasks: list[str], num_items: int) -> None:
    """With random weights; `jobs/bench/leaderboard.py` takes any model and more items."""
    command = [sys.executable, "jobs/bench/leaderboard.py", "--limit", "3", "--data", str(REAL), "--only", *tasks]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert {name: task["differing"] for name, task in result["tasks"].items() if task["differing"]} == {}
    assert result["ratio"] == 1.0
    assert result["max_difference"] < 1e-3
    assert result["num_items"] == num_items


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    checkpoint = make_model(tmp_path_factory.mktemp("model"), "llama")
    names = ["bleuish", "mygroup", "ppl", "twofilters", "with_fn", "inner"]

    def fork() -> int:  # a fork of a worker of Ray may go on as a second copy of it
        raise AssertionError("an evaluation forks this process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fork", fork)
        return evaluate(checkpoint, names, include=real("cases", "tasks"), limit={"bleuish": 3})


def test_awkward_task_files(scores: Scores) -> None:
    assert scores.tasks.keys() == {"bleuish", "mygroup", "ppl", "twofilters", "with_fn", "inner"}
    assert {name: (score.metric, score.scale) for name, score in scores.tasks.items()} == {
        "bleuish": ("chrf", 100.0),
        "mygroup": ("exact_match", 1.0),
        "ppl": ("word_perplexity", None),
        "twofilters": ("exact_match", 1.0),
        "with_fn": ("acc", 1.0),
        "inner": ("exact_match", 1.0),
    }
    assert 0 <= scores.tasks["bleuish"].value <= 1
    num_items = {name: score.n for name, score in scores.tasks.items()}
    assert num_items["bleuish"] == 3
    assert num_items["mygroup"] == 2 * num_items["inner"] > 6


def test_perplexities_are_in_no_mean(scores: Scores) -> None:
    result = recovery(scores, scores)
    assert result.left_out == ("ppl",)
    assert result.teacher_mean.value is not None
    assert result.teacher_mean.value <= 1
