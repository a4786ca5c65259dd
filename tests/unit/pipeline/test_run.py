"""A finished run read back: recovery, releases and reversals for machines; artifacts of earlier versions."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.cli.render import print_result
from sdft_ray.evaluation.release import Bounds
from sdft_ray.pipeline.run import Run
from sdft_ray.report.run.gather import read_scores
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.page import render
from sdft_ray.report.run.words import warnings
from sdft_ray.stages.spec import VERSIONS
from sdft_ray.statistics.paired import paired_bootstrap, recovery_interval
from sdft_ray.store import files
from sdft_ray.store.fingerprint import canonical_json
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of
from tests.support.finished_run import finished_run
from tests.unit.report.test_speeds import figures

STRICT = {"min_recovery": 0.7, "min_task_recovery": 0.5, "no_task_below_pruned": True}
WORSE = {
    "teacher": {"tiny_task": "1" * 40, "tiny_words": "1" * 40},
    "pruned": {"tiny_task": "1" * 30 + "0" * 10, "tiny_words": "1" * 20 + "0" * 20},
    "sft": {"tiny_task": "0" * 25 + "1" * 15, "tiny_words": "1" * 19 + "0" * 21},
    "sdft": {"tiny_task": "1" * 38 + "00", "tiny_words": "1" * 36 + "0000"},
}
"""sft falls from 30 to 15 right answers on one task and from 20 to 19 on the other."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nobody changes it."""
    return finished_run(tmp_path_factory.mktemp("run"), correct=WORSE, release=STRICT)


@pytest.fixture
def own(run: Run, tmp_path: Path) -> Run:
    """A copy that one may damage."""
    shutil.copytree(run.store.url, tmp_path / "own")
    return Run.open(Store(str(tmp_path / "own")), "quick")


def change_scores(run: Run, model: str, **fields: Any) -> None:
    """Of the first task; None takes a field away, as earlier versions wrote none."""
    path = run.store.path(run.manifests[f"evaluate:{model}"].address) / files.SCORES
    data = json.loads(path.read_text())
    task = data["tasks"]["tiny_task"]
    data["tasks"]["tiny_task"] = {**task, **fields}
    path.write_text(json.dumps(data))


def test_machines_are_told_who_may_be_released(run: Run) -> None:
    data = json.loads(json.dumps(run.to_json(), allow_nan=False))
    assert set(data["release"]) == {"sft", "sdft"}
    assert data["release"]["sdft"] == {"releasable": True, "reasons": []}
    assert data["release"]["sft"]["releasable"] is False
    reasons = data["release"]["sft"]["reasons"]
    assert [reason.split(" is ")[0] for reason in reasons[:3]] == [
        "Mean recovery",
        "Recovery on tiny_words",
        "Recovery on tiny_task",
    ]
    assert re.match(r"Fine-tuning made tiny_task worse than pruning alone: by 0\.375 \(95 % interval", reasons[3])
    assert len(reasons) == 4


def test_machines_are_told_intervals_and_reversals(run: Run) -> None:
    data, scores = run.to_json(), read_scores(run.store, run.manifests)
    for arm in ("sft", "sdft"):
        found = recovery_interval(scores["teacher"], scores[arm])
        told = data["recovery"][arm]
        assert (told["mean"], told["low"], told["high"]) == pytest.approx((found.value, found.low, found.high))
    assert data["recovery"]["sft"]["min"] == 15 / 40
    words, task = data["reversals"]["sft"]
    assert (task["task"], task["difference"], task["beyond_chance"]) == ("tiny_task", -0.375, True)
    found = paired_bootstrap(scores["pruned"], scores["sft"], tasks=["tiny_task"])
    assert (task["low"], task["high"]) == (found.low, found.high)
    assert (words["task"], words["beyond_chance"]) == ("tiny_words", False)
    assert data["reversals"]["sdft"] == []


def test_without_bounds_nobody_judges(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    assert run.to_json()["release"] == {}
    assert "eleasable" not in render(run.report_data())


def test_the_bounds_of_a_recipe_are_those_of_the_science(run: Run) -> None:
    release = run.recipe.release
    assert release is not None
    assert asdict(Bounds(**release.model_dump())) == STRICT


def test_the_terminal_says_what_the_page_says(own: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("teacher", "pruned", "sft", "sdft"):
        change_scores(own, model, num_truncated=12)
    print_result(own)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sft: not releasable. Mean recovery is 42.5 %") for line in lines)
    assert "sdft: releasable" in lines
    assert sum(line.startswith("Took longest: ") for line in lines) == 1
    assert any(
        line.startswith("Worse than after pruning alone, beyond chance: sft on tiny_task: −37.5") for line in lines
    )
    said = "tiny_task: 12 requests lost the beginning of their prompt: the context of 256 tokens is too short."
    assert f"Warning: {said}" in lines
    assert warnings(own.report_data()) == [said]
    assert said in render(own.report_data())


def test_a_cap_on_the_context_is_what_was_too_short(own: Run) -> None:
    change_scores(own, "sft", num_truncated=3)
    steps = dict(own.manifests)
    steps["evaluate:sft"] = replace(steps["evaluate:sft"], resources={"max_model_tokens": 48})
    found = replace(own, manifests=steps).report_data().truncation
    assert found is not None
    assert (found.tasks, found.context_tokens) == ({"tiny_task": 3}, 48)


def test_scores_of_an_earlier_version_are_shown(own: Run) -> None:
    for model in ("teacher", "pruned", "sft", "sdft"):
        path = own.store.path(own.manifests[f"evaluate:{model}"].address) / files.SCORES
        data = json.loads(path.read_text())
        del data["harness"]
        for task in data["tasks"].values():
            del task["written"]
        path.write_text(json.dumps(data))
    data = own.report_data()
    assert set(data.retention.students) == {"sft", "sdft"}
    render(data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_left_out(own: Run, value: float) -> None:
    change_scores(own, "sft", value=value, stderr=value, items={})
    data = own.report_data()
    assert list(data.scores["sft"]) == ["tiny_words"]
    assert data.recovery["sft"].mean.value is None
    assert not data.retention.judgements["sft"].releasable
    assert data.retention.judgements["sdft"].releasable
    json.dumps(own.to_json(), allow_nan=False)
    assert ReportData.from_json(data.to_json()) == data
    render(data)


@pytest.mark.parametrize("version", [1, VERSIONS["speed"]])
def test_speed_of_an_earlier_version_is_left_out(own: Run, version: int) -> None:
    identity = canonical_json({"stage": "speed", "version": version, "recipe": {}, "inputs": {}})
    old = {model: {"decode": {"median": 1.0, "rounds": [1.0]}} for model in ("teacher", "pruned")}
    summary = {"speed": figures(peak=600) if version == VERSIONS["speed"] else old}
    digest = "5" * 64
    made = Manifest("speed", "speed", address_of("speed", digest), digest, identity, {}, {}, Usage(), summary)
    data = replace(own, manifests={**own.manifests, "speed": made}).report_data()
    assert (data.speed is not None) == (version == VERSIONS["speed"])
    assert [stage.name for stage in data.stages][-1] == "speed"
