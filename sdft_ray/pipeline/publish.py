"""The last step: read every artifact of the run, write one page."""

from __future__ import annotations

import json
from pathlib import Path

from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.gather import gather
from sdft_ray.report.run.page import render
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.store import files


def run(job: StageContext, recipe: Recipe) -> StageResult:
    """Light: it runs in the driver. The page shows the whole recipe, which its inputs and its slice identify."""
    result = StageResult()
    job.phase("drawing the page")
    with UsageMeter() as meter, job.output(result) as directory:
        store = job.store
        found = {step: store.manifest(address) for step, address in job.inputs.items()}
        manifests = {step: manifest for step, manifest in found.items() if manifest is not None}
        place = recipe.gates
        gates = json.loads(Path(place).read_text(encoding="utf-8")) if place else []
        data = gather(recipe, store, recipe.name, manifests, gates=gates)
        (directory / files.REPORT).write_text(render(data), encoding="utf-8")
        result.summary = {"gates": gates}
    result.usage = meter.usage()
    return result
