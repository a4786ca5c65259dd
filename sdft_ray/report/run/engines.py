"""Which engines answered, and in which data type: what manifests say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdft_ray.models.precision import EngineUse
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.toolbox.words import joined
from sdft_ray.stages.names import StepName
from sdft_ray.store.manifest import Manifest

_DONE_BY = {"generate": "generation", "evaluate": "evaluation"}


def read_engines(manifests: Mapping[str, Manifest]) -> dict[str, tuple[EngineUse, ...]]:
    """By step; steps whose artifacts say nothing are left out: dry runs, servers, earlier versions."""
    found = {step: manifest.summary.get("engines", ()) for step, manifest in manifests.items()}
    return {
        step: tuple(EngineUse.from_json(engine) for engine in engines) for step, engines in found.items() if engines
    }


def engines_line(data: ReportData) -> str:
    """Engine of generation: vLLM, float32 (checkpoint bfloat16); of evaluation: the same. "" where nothing is known."""
    told = {}
    for stage, what in _DONE_BY.items():
        used = [
            engine
            for step, engines in data.engines.items()
            if StepName.parse(step).stage == stage
            for engine in engines
        ]
        if used:
            told[what] = _in_words(used)
    parts = [f"{what}: {words}" for what, words in told.items()]
    if len(set(told.values())) == 1 < len(told):
        parts = [f"{joined(list(told))}: {next(iter(told.values()))}"]
    return f"Engine of {'; of '.join(parts)}." if parts else ""


def engines_warnings(data: ReportData) -> list[str]:
    """A warning where models were evaluated in different types, which can move scores by rounding."""
    by_model = {
        StepName.parse(step).label: {engine.precision.dtype for engine in engines}
        for step, engines in data.engines.items()
        if StepName.parse(step).stage == "evaluate"
    }
    if len(set().union(*by_model.values())) < 2:
        return []
    each = joined([f"{model} in {joined(sorted(dtypes))}" for model, dtypes in by_model.items()])
    return [f"Not all models were evaluated in one data type, which moves scores by rounding: {each}."]


def _in_words(used: Sequence[EngineUse]) -> str:
    """Each kind and type once, with the types of the checkpoints where they are others."""
    checkpoints: dict[tuple[str, str], set[str]] = {}
    for engine in used:
        stored = checkpoints.setdefault((engine.name, engine.precision.dtype), set())
        stored |= {engine.precision.checkpoint} - {engine.precision.dtype}
    return joined(
        [
            f"{name}, {dtype}" + (f" (checkpoint {joined(sorted(stored))})" if stored else "")
            for (name, dtype), stored in checkpoints.items()
        ]
    )
