"""From the artifacts of a run to the values that the report and the tables show."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sdft_ray.data.messages import messages_of, row_prompt
from sdft_ray.data.reading import Reading
from sdft_ray.evaluation import forgetting
from sdft_ray.evaluation.divergence import TeacherKl
from sdft_ray.evaluation.forgetting import Likeness
from sdft_ray.evaluation.recovery import Recovery, recovery
from sdft_ray.evaluation.rounds import ModelSpeed
from sdft_ray.evaluation.shift import ResponseNll
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run import trainings
from sdft_ray.report.run.engines import read_engines
from sdft_ray.report.run.model import (
    TEACHER,
    Decontamination,
    Distances,
    Forgetting,
    Gap,
    Gate,
    Plan,
    ReportData,
    Sample,
    Sizes,
    Speed,
    Stage,
    Truncation,
)  # fmt: skip
from sdft_ray.report.run.retention import retention
from sdft_ray.stages.names import by_label
from sdft_ray.stages.spec import VERSIONS
from sdft_ray.statistics.estimate import Estimate, finite
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

_SETS = {"seed set": "seed", "calibration set": "calibration", "forgetting": "texts"}
"""Set of rows -> the step that reads it."""
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
    students = {arm: trainings.student_manifest(manifests, arm) for arm in recipe.train.arms}
    histories = {arm: trainings.history(store, trained) for arm, trained in students.items() if trained}
    chosen = trainings.grids(recipe, manifests)
    newest = max((manifest.created for manifest in manifests.values()), default="")
    return ReportData(
        name=name,
        created=newest,
        description=recipe.description,
        recipe_yaml=_portable(recipe),
        teacher_model=recipe.teacher.model,
        arms=trainings.arms(recipe, chosen),
        sizes=Sizes.model_validate(manifests["prune"].summary["sizes"]) if "prune" in manifests else None,
        distances=_distances(store, manifests),
        plan=_plan(recipe, manifests, ""),
        earlier=tuple(
            plan for name, part in recipe.prunings.items() if name and (plan := _plan(part, manifests, f":{name}"))
        ),
        scores={model: _estimates(part) for model, part in scores.items()},
        not_averaged={
            task: score.not_averaged
            for own in scores.values()
            for task, score in own.tasks.items()
            if score.not_averaged is not None
        },
        scales={
            task: (score.metric, score.scale)
            for own in scores.values()
            for task, score in own.tasks.items()
            if score.not_averaged is None and score.scale is not None and score.scale != 1
        },
        recovery=recoveries(scores, recipe.evaluate.tuned),
        retention=retention(scores, recipe.evaluate.tuned, recipe.release),
        truncation=_truncation(recipe, store, manifests, scores),
        tuned_families=recipe.evaluate.tuned,
        loss_curves={arm: trainings.losses(records) for arm, records in histories.items()},
        training_costs={arm: trainings.cost(records) for arm, records in histories.items()},
        training_notes={arm: trainings.training_notes(trained.summary) for arm, trained in students.items() if trained},
        grids=chosen,
        correction=trainings.correction(recipe, manifests),
        forgetting=read_forgetting(store, manifests),
        rows_read=_rows_read(manifests),
        decontamination=_decontamination(manifests),
        selection=manifests["select"].summary["reasons"] if "select" in manifests else {},
        samples=_samples(distilled),
        gap=_gap(manifests),
        speed=_speed(recipe, manifests),
        stages=tuple(_stage(step, manifest, step in skipped) for step, manifest in manifests.items()),
        versions=next((m.versions for m in manifests.values() if m.created == newest), {}),
        machine=_machine(),
        engines=read_engines(manifests),
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
        **{name: summary[name] for name in ("candidates", "compared", "stability") if name in summary},
    )


def _portable(recipe: Recipe) -> str:
    """The recipe's YAML with local paths relative to the folder that they share, wherever that lay."""
    evaluate = recipe.evaluate
    parts = [recipe.teacher.model, recipe.seed_set.source, recipe.calibration.source, evaluate.include, evaluate.data]
    parts += [recipe.forgetting.source, recipe.forgetting.embedding] if recipe.forgetting else []
    local = [str(part) for part in (*parts, recipe.gates) if part and os.path.isabs(str(part))]
    base = os.path.commonpath(local) if len(local) > 1 else ""
    text = recipe.to_yaml()
    return text.replace(f"{base}/", "./").replace(f" {base}\n", " .\n") if len(base) > 1 else text


def _summary(manifests: Mapping[str, Manifest], step: str) -> dict[str, Any]:
    return manifests[step].summary if step in manifests else {}


def read_scores(store: Store, manifests: Mapping[str, Manifest]) -> dict[str, Scores]:
    """Scores with their items, by model, in the order of the steps."""
    evaluated = by_label(manifests, "evaluate").items()
    return {model: Scores.from_json(_read_json(store.path(own.address) / files.SCORES)) for model, own in evaluated}


def recoveries(scores: Mapping[str, Scores], tuned: Collection[str]) -> dict[str, Recovery]:
    """Recovery of the pruned model and of every student; {} without the teacher's scores."""
    if TEACHER not in scores:
        return {}
    others = {model: own for model, own in scores.items() if model != TEACHER}
    return {model: finite(recovery(scores[TEACHER], own, tuned=tuned)) for model, own in others.items()}


def _estimates(scores: Scores) -> dict[str, Estimate]:
    """Without the scores that are not numbers."""
    known = (score for score in scores.tasks.values() if math.isfinite(score.value))
    return {score.task: finite(Estimate(score.value, score.stderr, n=score.n)) for score in known}


def _gap(manifests: Mapping[str, Manifest]) -> Gap | None:
    """The teacher's figures, and those of the pruned model where it was asked."""
    summary = _summary(manifests, "gap")
    if not summary:
        return None
    pruned = _summary(manifests, "gap:pruned")
    models = {name: {**summary[name], **pruned.get(name, {})} for name in ("nll", "gaps")}
    return TypeAdapter(Gap).validate_python({**summary, **models})


def read_forgetting(store: Store, manifests: Mapping[str, Manifest]) -> Forgetting | None:
    """All models in the order of the steps; None where the teacher was not measured."""
    steps = by_label(manifests, "forget")
    if TEACHER not in steps:
        return None
    figures = forgetting.forgetting({model: _read_nll(store, manifest) for model, manifest in steps.items()})
    likeness = TypeAdapter(Likeness)
    return Forgetting(
        **vars(figures),
        held_out=steps[TEACHER].summary["held_out"],
        likeness={
            model: likeness.validate_python(manifest.summary)
            for model, manifest in by_label(manifests, "likeness").items()
        },
        kl={
            model: TypeAdapter(TeacherKl).validate_python(manifest.summary["kl"])
            for model, manifest in steps.items()
            if "kl" in manifest.summary
        },
        verdicts={text: words for text in forgetting.NAMES if (words := forgetting.verdict(figures, text))},
    )


def _read_nll(store: Store, manifest: Manifest) -> dict[str, dict[str, ResponseNll]]:
    texts = _read_json(store.path(manifest.address) / files.FORGET)["rows"]
    return {text: {name: ResponseNll(**row) for name, row in rows.items()} for text, rows in texts.items()}


def _truncation(
    recipe: Recipe, store: Store, manifests: Mapping[str, Manifest], scores: Mapping[str, Scores]
) -> Truncation | None:
    """The maximum over models, as all answer the same requests; None where all prompts were read whole."""
    tasks: dict[str, int] = {}
    for own in scores.values():
        for task, score in own.tasks.items():
            if score.num_truncated:
                tasks[task] = max(score.num_truncated, tasks.get(task, 0))
    return Truncation(tasks=tasks, context_tokens=_context(recipe, store, manifests)) if tasks else None


def _context(recipe: Recipe, store: Store, manifests: Mapping[str, Manifest]) -> int | None:
    """The smallest of a student's context (which is the teacher's) and the limits of the evaluations."""
    limits: list[Any] = [m.resources.get("max_model_tokens") for m in manifests.values() if m.stage == "evaluate"]
    student = next(
        (result for arm in recipe.train.arms if (result := trainings.student_manifest(manifests, arm))), None
    )
    path = store.path(student.address) / "config.json" if student else None
    if path is not None and path.exists():
        config: dict[str, Any] = _read_json(path)
        limits.append({**config, **config.get("text_config", {})}.get("max_position_embeddings"))
    return min((tokens for tokens in limits if isinstance(tokens, int)), default=None)


def _distances(store: Store, manifests: Mapping[str, Manifest]) -> Distances | None:
    if "measure" not in manifests:
        return None
    return Distances(**_read_json(store.path(manifests["measure"].address) / files.DEPTH_SCORES))


def _decontamination(manifests: Mapping[str, Manifest]) -> Decontamination | None:
    result = _summary(manifests, "seed").get("decontamination")
    return Decontamination.model_validate(result) if result else None


def _rows_read(manifests: Mapping[str, Manifest]) -> dict[str, tuple[str, ...]]:
    """Sets of which there is something to tell; artifacts of earlier versions say nothing."""
    found = {name: _summary(manifests, step).get("reading") for name, step in _SETS.items()}
    told = {name: tuple(Reading.of(reading).sentences()) for name, reading in found.items() if reading}
    return {name: sentences for name, sentences in told.items() if sentences}


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
            instruction=_asked(row),
            reference=row["reference_response"],
            distilled=row["distilled_response"],
            reason=row["reason"],
            family=row["family"],
        )
        for row in chosen[:NUM_SAMPLES]
    )


def _asked(row: Mapping[str, Any]) -> str:
    """What a row asks; of a conversation all messages with their roles."""
    if not row.get("context"):  # tables of earlier versions do not have it
        return row["instruction"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages_of(row_prompt(row)))


def _speed(recipe: Recipe, manifests: Mapping[str, Manifest]) -> Speed | None:
    """Only of the present version of that stage: earlier ones measured other things."""
    manifest = manifests.get("speed")
    if manifest is None or json.loads(manifest.identity).get("version") != VERSIONS["speed"]:
        return None
    return speed(recipe, manifest.summary["speed"])


def speed(recipe: Recipe, summary: Mapping[str, Any]) -> Speed:
    """`summary`: model -> `ModelSpeed` as plain data. A peak that is unknown for one model is shown for neither."""
    models = {name: TypeAdapter(ModelSpeed).validate_python(part) for name, part in summary.items()}
    return Speed(prompt_tokens=recipe.speed.prompt_tokens, new_tokens=recipe.speed.new_tokens, **models)


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
