"""`sdft explain`: the plan of work, before any of it is done. Needs no torch, no Ray, no GPU."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft_ray.generation.footprint import PassBytes, pass_bytes
from sdft_ray.models.families import Config
from sdft_ray.models.precision import AUTO, EngineUse, Precision, expected_precision, stored_dtype
from sdft_ray.models.size import ModelSize
from sdft_ray.pipeline.detectable import Detectable, detectable
from sdft_ray.pipeline.memory import MemoryPlan, plan_memory
from sdft_ray.pipeline.preflight import check_precision, planned_size
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Evaluate, Generate, Resources
from sdft_ray.stages.graph import State, Step, nearest, resolve
from sdft_ray.stages.names import StepName
from sdft_ray.stages.sources import Sources
from sdft_ray.stages.spec import STAGES
from sdft_ray.store.store import Store


@dataclass(frozen=True)
class Line:
    """One step: what it is, where its result is or will be, and why it must run."""

    step: str
    status: str
    address: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """Steps in order, and the sizes that will come out; `None` where the teacher's config is out of reach.

    `generated` is also None when the teacher's pass is done. `engines` are those of stages that are not done yet.
    """

    lines: tuple[Line, ...]
    teacher: ModelSize | None
    pruned: ModelSize | None
    generated: PassBytes | None
    detectable: Detectable
    engines: dict[str, EngineUse] = field(default_factory=dict)
    memory: MemoryPlan = field(default_factory=lambda: MemoryPlan(Resources()))
    """What steps that are not done need of this machine, and what is chosen; nothing is refused here."""


def explain(recipe: Recipe, store: Store, resources: Resources | None = None) -> Explanation:
    """What `compress` would do now. Raises `UserError` for what cannot work."""
    resources = resources or Resources()
    check_precision(recipe, resources)
    sources = Sources(recipe, store)
    teacher = sources.teacher.described
    states = resolve(recipe, store, sources)
    generated = None
    if teacher is not None and states["generate"].status != "done":
        generated = pass_bytes(recipe.generate, teacher.config, _num_seed_rows(recipe, states["seed"]))
    return Explanation(
        tuple(Line(name, state.status, state.address, _why(state, store)) for name, state in states.items()),
        teacher.size if teacher else None,
        planned_size(recipe, teacher.config) if teacher else None,
        generated,
        detectable(recipe, store, states),
        _engines(recipe, resources, teacher.config, states) if teacher else {},
        plan_memory(recipe, resources, sources.teacher, states, explaining=True),
    )


def _engines(recipe: Recipe, resources: Resources, config: Config, states: dict[str, State]) -> dict[str, EngineUse]:
    """By stage. The students of a run have the teacher's type, so its config stands for theirs."""
    missing = {state.step.stage for state in states.values() if state.status != "done"}
    parts: dict[str, Generate | Evaluate] = {"generate": resources.generate, "evaluate": resources.evaluate}
    return {
        stage: EngineUse(part.sampler, _precision(recipe, part, config))
        for stage, part in parts.items()
        if stage in missing and part.sampler in ("vllm", "transformers")
    }


def _precision(recipe: Recipe, part: Generate | Evaluate, config: Config) -> Precision:
    wanted = recipe.teacher.dtype
    if os.environ.get("RAY_ADDRESS") and part.dtype == AUTO and wanted != "float32":
        return Precision(AUTO, stored_dtype(config), "chosen on the node where an engine starts")
    return expected_precision(part.dtype, config, wanted, kv_cache_bytes=part.kv_bytes, gpus=part.gpus)


def _num_seed_rows(recipe: Recipe, seed: State) -> int | None:
    """Rows of the seed set: as committed, else counted in a local file, else at most its limit; unchecked."""
    if seed.manifest is not None:
        return seed.manifest.summary["num_rows"]
    path = Path(recipe.seed_set.source)
    limit = min((most for most in (recipe.seed_set.limit, recipe.seed_set.sample) if most), default=None)
    if not path.is_file():
        return limit
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            count = pq.read_metadata(path).num_rows
        except pa.ArrowException:
            return limit  # `compress` says what is wrong with the file
    else:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                count = sum(not line.isspace() for line in stream)
        except (OSError, EOFError):
            return limit
    return count if limit is None else min(count, limit)


def _why(state: State, store: Store) -> str:
    if state.status == "waits":
        waited = StepName.parse(state.waits)
        if STAGES[waited.stage].output == "choice":
            return f"waits until a trial of {waited.subject} is chosen"
        return f"waits for the {state.waits}"
    if state.status == "done":
        assert state.manifest is not None
        created = f"created {state.manifest.created[:16].replace('T', ' ')}, {state.manifest.usage.wall_s:.1f} s"
        return created + _outcome(state.step, state.manifest.summary)
    near = nearest(state, store)
    if near is None:
        return "never computed"
    manifest, changed = near
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return f"differs from {manifest.address[-16:][:6]}: {shown}"


def _outcome(step: Step, summary: dict[str, Any]) -> str:
    """How a trial ended, which one was chosen, and which tokens could not be measured."""
    if "diverged" in summary:
        return "; diverged"
    if zero_tokens := summary.get("zero_tokens"):
        names = ", ".join(zero_tokens)
        return f"; {sum(zero_tokens.values())} tokens left out, whose hidden states are all zero: {names}"
    if "stability" in summary:
        return f"; the same blocks in {100 * summary['stability']['share']:.0f} % of resampled calibration rows"
    if "held_out_loss" in summary:
        return f"; held-out loss {summary['held_out_loss']:.3f}"
    return f"; chose {step.inputs[summary['chosen']]}" if STAGES[step.stage].output == "choice" else ""
