"""From the artifacts of a run to the plain values that the report and the tables show."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft_ray.evaluation.recovery import Estimate, recovery
from sdft_ray.recipe.arms import Objective
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.forgetting import forgetting
from sdft_ray.report.run.model import (
    Arm,
    Cost,
    Decontamination,
    Distances,
    Gap,
    Gate,
    Grid,
    LossPoint,
    Plan,
    Ratio,
    Recovery,
    ReportData,
    Sample,
    Score,
    Sizes,
    Speed,
    Stage,
)
from sdft_ray.report.run.retention import retention, truncation
from sdft_ray.report.run.speeds import compared_speeds
from sdft_ray.report.run.training import correction, grids, student_manifest
from sdft_ray.stages.spec import VERSIONS
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

TERM_NAMES = {
    "cross_entropy": "cross-entropy",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon",
    "top_k_kl": "top-k KL",
    "hidden_cosine": "hidden-state cosine",
    "hidden_mse": "hidden-state MSE",
}
"""Terms of an objective as people read them."""
NUM_SAMPLES = 8
"""Rows of the distilled set that are shown, spread over reasons and families."""


def gather(
    recipe: Recipe,
    store: Store,
    name: str,
    manifests: Mapping[str, Manifest],
    *,
    skipped: Collection[str] = (),
    gates: Sequence[Mapping[str, Any]] = (),
) -> ReportData:
    """Everything known about a run. `manifests` maps steps to committed artifacts; absent steps leave gaps."""
    scores = read_scores(store, manifests)
    distilled = _distilled(store, manifests)
    students = {arm: student_manifest(manifests, arm) for arm in recipe.train.arms}
    histories = {arm: _history(store, trained) for arm, trained in students.items() if trained}
    chosen = grids(recipe, manifests)
    newest = max((manifest.created for manifest in manifests.values()), default="")
    return ReportData(
        name=name,
        created=newest,
        description=recipe.description,
        recipe_yaml=_portable(recipe),
        teacher_model=recipe.teacher.model,
        arms=_arms(recipe, chosen),
        sizes=Sizes.model_validate(manifests["prune"].summary["sizes"]) if "prune" in manifests else None,
        distances=_distances(store, manifests),
        plan=_plan(recipe, manifests, ""),
        earlier=tuple(
            plan for name, part in recipe.prunings.items() if name and (plan := _plan(part, manifests, f":{name}"))
        ),
        scores={model: _shown_scores(s) for model, s in scores.items()},
        recovery=recoveries(scores, recipe.evaluate.tuned),
        retention=retention(scores, recipe.evaluate.tuned, recipe.release),
        truncation=truncation(recipe, store, manifests, scores),
        tuned_families=recipe.evaluate.tuned,
        loss_curves={arm: _losses(records) for arm, records in histories.items()},
        training_costs={arm: _cost(records) for arm, records in histories.items()},
        training_notes={arm: _training_notes(trained.summary) for arm, trained in students.items() if trained},
        grids=chosen,
        correction=correction(recipe, manifests),
        forgetting=forgetting(store, manifests),
        decontamination=_decontamination(manifests),
        selection=manifests["select"].summary["reasons"] if "select" in manifests else {},
        samples=_samples(distilled),
        gap=Gap.model_validate(manifests["gap"].summary) if "gap" in manifests else None,
        speed=_speed(recipe, manifests),
        stages=tuple(_stage(step, manifest, step in skipped) for step, manifest in manifests.items()),
        versions=next((m.versions for m in manifests.values() if m.created == newest), {}),
        machine=_machine(),
        gates=tuple(Gate.model_validate(gate) for gate in gates),
    )


def _plan(recipe: Recipe, manifests: Mapping[str, Manifest], about: str) -> Plan | None:
    """Of the pruning whose steps end in `about`."""
    summary = _summary(manifests, f"plan{about}")
    if not summary:
        return None
    depth = recipe.depth
    return Plan(
        num_blocks=summary["plan"]["num_blocks"],
        keep_blocks=tuple(summary["plan"]["keep_blocks"]),
        metric=depth.metric,
        position=depth.position if depth.metric == "angular_distance" else "",
        widths=summary.get("widths", {}),
        residuals=tuple(tuple(patch) for patch in _summary(manifests, f"patch{about}").get("residuals", ())),
    )


def _arms(recipe: Recipe, chosen: Mapping[str, Grid]) -> dict[str, Arm]:
    """What each student was made of; an arm whose trial is not chosen yet has no rate."""
    rates = {name: trial.learning_rate for name, trial in recipe.train.trials.items()}
    rates |= {name: trial.learning_rate for name, grid in chosen.items() for trial in grid.trials if trial.chosen}
    trained = {
        name: Arm(
            data=arm.data,
            learning_rate=rates.get(name),
            objective=_in_words(arm.objective),
            num_rows=arm.num_rows,
        )
        for name, arm in recipe.train.arms.items()
    }
    merged = {
        name: Arm(data=f"{merge.kind} of {merge.arms[0]} and {merge.arms[1]} at {t:g}")
        for name, (merge, t) in recipe.merged.items()
    }
    patched = {"patched": Arm(data="a linear map at the cut, not tuned")} if recipe.patch else {}
    return patched | trained | merged


def _in_words(objective: Objective) -> str:
    """ "" for plain fine-tuning, else the terms with their weights: `forward KL + 0.5 cross-entropy`."""
    if objective.terms == ("cross_entropy",):
        return ""
    weights = {name: getattr(objective, name) for name in objective.terms}
    parts = [("" if w == 1 else f"{w:g} ") + TERM_NAMES[name] for name, w in weights.items()]
    cooled = f" at temperature {objective.temperature:g}" if objective.temperature != 1 else ""
    return " + ".join(parts) + cooled + (" from cached signals" if objective.cached else "")


def _portable(recipe: Recipe) -> str:
    """The recipe's YAML with local paths relative to the folder that they share, wherever that lay."""
    parts = [recipe.teacher.model, recipe.seed_set.source, recipe.calibration.source, recipe.evaluate.include]
    parts += [recipe.forgetting.source, recipe.forgetting.embedding] if recipe.forgetting else []
    local = [str(part) for part in (*parts, recipe.gates) if part and os.path.isabs(str(part))]
    base = os.path.commonpath(local) if len(local) > 1 else ""
    return recipe.to_yaml().replace(f"{base}/", "./") if len(base) > 1 else recipe.to_yaml()


def _summary(manifests: Mapping[str, Manifest], step: str) -> dict[str, Any]:
    return manifests[step].summary if step in manifests else {}


def read_scores(store: Store, manifests: Mapping[str, Manifest]) -> dict[str, Scores]:
    """Scores with their items, by model, in the order of the steps."""
    found = {}
    for step, manifest in manifests.items():
        stage, _, model = step.partition(":")
        if stage == "evaluate":
            found[model] = Scores.from_json(_read_json(store.path(manifest.address) / files.SCORES))
    return found


def recoveries(scores: Mapping[str, Scores], tuned: Collection[str]) -> dict[str, Recovery]:
    """Recovery of the pruned model and of every student."""
    if "teacher" not in scores:
        return {}
    found = {}
    for model, own in scores.items():
        if model == "teacher":
            continue
        kept = recovery(scores["teacher"], own, tuned=tuned)
        found[model] = Recovery(
            mean=_ratio(kept.mean),
            min=_finite(kept.min.value),
            tasks={task: _ratio(estimate) for task, estimate in kept.tasks.items()},
            tuned=_ratio(kept.tuned) if kept.tuned else None,
            off_domain=_ratio(kept.off_domain) if kept.off_domain else None,
        )
    return found


def _ratio(estimate: Estimate) -> Ratio:
    return Ratio(value=_finite(estimate.value), stderr=_finite(estimate.stderr))


def _shown_scores(scores: Scores) -> dict[str, Score]:
    """Without those that are no number."""
    return {
        task: Score(value=s.value, stderr=_finite(s.stderr), n=s.n)
        for task, s in scores.tasks.items()
        if math.isfinite(s.value)
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _distances(store: Store, manifests: Mapping[str, Manifest]) -> Distances | None:
    if "measure" not in manifests:
        return None
    data = _read_json(store.path(manifests["measure"].address) / files.DEPTH_SCORES)
    return Distances(
        angular_last=data["angular_last_LN"],
        angular_mean=data["angular_mean_LN"],
        block_influence=data["block_influence_L"],
        num_sequences=data["num_sequences"],
        num_tokens=data["num_tokens"],
    )


def _history(store: Store, trained: Manifest) -> list[dict[str, Any]]:
    path = store.path(trained.address) / files.HISTORY
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _training_notes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """In words; artifacts of earlier versions say nothing."""
    counts = [
        (summary.get("num_dropped", 0), "rows were left out: too long for train.max_seq_len"),
        (summary.get("num_cut", 0), "prompts were cut at their beginning to fit train.max_seq_len"),
        (
            summary.get("signals", {}).get("num_left_out", 0),
            "rows were left out: the teacher’s signals do not cover them",
        ),
    ]
    return (*(f"{number:,} {what}" for number, what in counts if number), *summary.get("notes", ()))


def _losses(records: Sequence[Mapping[str, Any]]) -> tuple[LossPoint, ...]:
    return tuple(LossPoint(r["step"], r["loss"], r["learning_rate"]) for r in records)


def _cost(records: Sequence[Mapping[str, Any]]) -> Cost:
    """Histories of before these figures were recorded lack them."""

    def known(name: str) -> list[Any]:
        return [record[name] for record in records if record.get(name) is not None]

    def median(name: str) -> float | None:
        return statistics.median(known(name)) if known(name) else None

    return Cost(
        tokens_per_s=median("tokens_per_s"),
        mfu=median("mfu"),
        peak_memory_bytes=max(known("peak_memory_bytes"), default=None),
    )


def _decontamination(manifests: Mapping[str, Manifest]) -> Decontamination | None:
    found = _summary(manifests, "seed").get("decontamination")
    return Decontamination.model_validate(found) if found else None


def _distilled(store: Store, manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    if "select" not in manifests:
        return []
    import pyarrow.parquet as pq

    return pq.read_table(store.path(manifests["select"].address) / files.DISTILLED).to_pylist()


def _samples(rows: list[dict[str, Any]]) -> tuple[Sample, ...]:
    """A few rows: the first of each (reason, family) in turn, so that rare reasons show."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        first.setdefault((row["reason"], row["family"]), row)
    chosen: list[dict[str, Any]] = []
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for (reason, _), row in first.items():
        by_reason.setdefault(reason, []).append(row)
    while by_reason and len(chosen) < NUM_SAMPLES:
        for reason in list(by_reason):
            chosen.append(by_reason[reason].pop(0))
            if not by_reason[reason]:
                del by_reason[reason]
    return tuple(
        Sample(
            example_id=row["example_id"],
            instruction=row["instruction"],
            reference=row["reference_response"],
            distilled=row["distilled_response"],
            reason=row["reason"],
            family=row["family"],
        )
        for row in chosen[:NUM_SAMPLES]
    )


def _speed(recipe: Recipe, manifests: Mapping[str, Manifest]) -> Speed | None:
    """Of the present version of that stage: earlier ones measured other things."""
    made = manifests.get("speed")
    if made is None or json.loads(made.identity).get("version") != VERSIONS["speed"]:
        return None
    return compared_speeds(recipe, made.summary["speed"])


def _stage(step: str, manifest: Manifest, skipped: bool) -> Stage:
    usage = manifest.usage
    return Stage(
        name=step,
        address=manifest.address,
        wall_s=usage.wall_s,
        peak_rss_bytes=usage.peak_rss_bytes,
        num_tokens=usage.num_tokens,
        skipped=skipped,
    )


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB memory"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
