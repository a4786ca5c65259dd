"""Stage `choose`: which trial of an arm is its student, by the loss on rows that none of them was trained on.

The choice is a value: downstream it counts as the trial that it names, and no weights are copied.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.store import files
from sdft_ray.training.trials import Outcome, best_trial


def run(job: StageContext) -> StageResult:
    """Compare what the trials' manifests say. Light: it runs in the driver. Raises `DivergenceError`."""
    result = StageResult()
    with UsageMeter() as meter, job.output(result) as directory:
        asked = job.slice["trials"]
        found = {f"trial_{i}": _summary(job, f"trial_{i}") for i in range(1, len(asked) + 1)}
        outcomes = [_outcome(trial, summary) for trial, summary in zip(asked, found.values(), strict=True)]
        chosen = list(found)[best_trial(outcomes)]
        result.summary = {
            "chosen": chosen,
            "trials": dict(zip(found, map(asdict, outcomes), strict=True)),
            "num_held_out_rows": found[chosen]["num_held_out_rows"],
            "num_held_out_tokens": found[chosen]["num_held_out_tokens"],
        }
        (directory / files.CHOICE).write_text(json.dumps(result.summary), encoding="utf-8")
    result.usage = meter.usage()
    return result


def _summary(job: StageContext, role: str) -> dict[str, Any]:
    manifest = job.store.manifest(job.inputs[role])
    assert manifest is not None, "trials are committed before one is chosen"
    return manifest.summary


def _outcome(trial: dict[str, Any], summary: dict[str, Any]) -> Outcome:
    return Outcome(trial["learning_rate"], trial["seed"], summary.get("held_out_loss"), summary.get("diverged", ""))
