"""A study: many recipes that share artifacts, one curve. Choose rates first, then train all seeds, then draw."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.pipeline.local_data import from_folder
from sdft_ray.pipeline.memory import smallest
from sdft_ray.pipeline.preflight import preflight
from sdft_ray.pipeline.scheduler import GraphRun, run_missing
from sdft_ray.pipeline.step import needed_steps
from sdft_ray.progress import ViewName, libraries_to, open_run_view, teller
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.study import Group, Size, Study, arm_name, groups, rate_recipe, seed_recipe, size_of_study
from sdft_ray.recipe.yaml_model import dump_yaml
from sdft_ray.report.run.gather import read_scores
from sdft_ray.stages.graph import steps
from sdft_ray.statistics.scores import Scores
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

ROWS = pa.schema(
    [
        ("variant", pa.string()),
        ("metric", pa.string()),
        ("remove_blocks", pa.int32()),
        ("num_blocks", pa.int32()),
        ("arm", pa.string()),
        ("num_rows", pa.int32()),
        ("seed", pa.int32()),
        ("learning_rate", pa.float64()),
        ("held_out_loss", pa.float64()),
        ("task", pa.string()),
        ("tuned", pa.bool_()),
        ("chance", pa.float64()),
        ("score", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int32()),
        ("teacher_score", pa.float64()),
        ("pruned_score", pa.float64()),
        ("items", pa.list_(pa.float32())),
        ("teacher_items", pa.list_(pa.float32())),
    ]
)
"""One row per student and task. Items are in ascending order of their names, the same for all models."""


@dataclass(frozen=True)
class Shared:
    """What a study took. `num_steps` counts steps of all its recipes, `num_artifacts` what lies behind them."""

    num_recipes: int
    num_steps: int
    num_artifacts: int
    num_made: int
    """By this run; all others were there."""
    wall_s: float
    """Of making all artifacts, one after the other, whenever that was."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Tasks that have no rows, since they can be in no mean, and why."""


@dataclass(frozen=True)
class StudyRun:
    """The result: `rows` has the schema `ROWS`."""

    study: Study
    rows: pa.Table
    shared: Shared

    @property
    def yaml(self) -> str:
        """The study's own, without the folder that it came from."""
        content = self.study.model_dump(mode="json", exclude_defaults=True)
        return dump_yaml({**content, "recipe": f"./{Path(self.study.recipe).name}"})


@dataclass(frozen=True)
class Planned:
    """What a study asks for, and how many of its trainings are in the store. Seeds count when rates are chosen."""

    size: Size
    num_done: int

    def to_json(self) -> dict[str, int]:
        return {**asdict(self.size), "num_trainings": self.size.num_trainings, "num_done": self.num_done}


def plan_study(study: Study, store: Store, *, data: Path | None = None) -> Planned:
    """Starts nothing; `data` as in `run_study`. Raises `RecipeError`, also when the grid exceeds the study's budget."""
    size, done = size_of_study(study), set()
    resources = Resources()
    for group in groups(study):
        walks = [_walk(study, group, rate_recipe(study, group), "train", store, resources, data)]
        rates = _chosen(study, group, walks[0])
        if rates is not None:
            walks.append(_walk(study, group, seed_recipe(study, group, rates), "train", store, resources, data))
        states = [state for walk in walks for state in walk.states.values()]
        done |= {state.address for state in states if state.step.stage == "train" and state.status == "done"}
    return Planned(size, len(done))


def run_study(
    study: Study,
    store: Store,
    resources: Resources | None = None,
    *,
    data: Path | None = None,
    view: ViewName = "auto",
) -> StudyRun:
    """Run every recipe of a study, side by side as the cluster allows. What is in the store is taken over.

    `data` is a folder with what the recipes name on the hub (`local_data`).

    Raises `UserError` before any worker starts, and `StageError`, as `compress` does.
    """
    resources = resources or Resources()
    store.check_writable()
    size_of_study(study)
    parts = groups(study)
    chosen: list[GraphRun | None] = [None] * len(parts)
    if len(study.learning_rates) > 1:
        chosen = [_walk(study, group, rate_recipe(study, group), "choose", store, resources, data) for group in parts]
    trained = [
        _seed_walk(study, group, walk, store, resources, data) for group, walk in zip(parts, chosen, strict=True)
    ]
    sentences: list[str] = []
    log = store.log_path(study.name)
    with libraries_to(log):
        for walk in trained:
            if walk.missing():
                preflight(walk.recipe, store, resources, walk.states, walk.teacher, tell=sentences.append)
    rated = [walk for walk in chosen if walk is not None]
    _run(rated, resources, view, log, dict.fromkeys(sentences))
    trained = [
        _seed_walk(study, group, walk, store, resources, data) for group, walk in zip(parts, chosen, strict=True)
    ]
    _run(trained, resources, view, log)
    rows = [row for group, walk in zip(parts, trained, strict=True) for row in _rows(study, group, walk)]
    return StudyRun(study, pa.Table.from_pylist(rows, schema=ROWS), _shared([*rated, *trained]))


def walks_of(study: Study, store: Store, *, data: Path | None = None) -> Iterator[tuple[Group, GraphRun]]:
    """Over what a study asks for, finished or not: of each group all rates, then all seeds at the chosen ones, if these
    are chosen. Starts nothing; `data` as in `run_study`."""
    resources = Resources()
    for group in groups(study):
        rated = None
        if len(study.learning_rates) > 1:
            rated = _walk(study, group, rate_recipe(study, group), "choose", store, resources, data)
            yield group, rated
        if _chosen(study, group, rated) is not None:
            yield group, _seed_walk(study, group, rated, store, resources, data)


def rows_file(rows: pa.Table) -> bytes:
    """A study's rows as Parquet."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()


def _walk(
    study: Study, group: Group, recipe: Recipe, stage: str, store: Store, resources: Resources, data: Path | None
) -> GraphRun:
    """Over what the steps of one stage need, and no more: no page, no speed. Where students are evaluated, what they
    have forgotten is measured too, if the recipe asks for it."""
    recipe = from_folder(recipe, data)
    known = steps(recipe)
    asked = {stage, "forget"} if stage == "evaluate" else {stage}
    wanted = needed_steps(known, {step.name for step in known if step.stage in asked})
    walk = GraphRun(recipe, store, resources, f"{study.name}-{group.name}", known, wanted, label=group.name)
    walk.refresh()
    return walk


def _seed_walk(
    study: Study, group: Group, rated: GraphRun | None, store: Store, resources: Resources, data: Path | None
) -> GraphRun:
    """Over all seeds at the chosen rates; while these are not known, at one that will do to check the recipe."""
    rates = _chosen(study, group, rated) or dict.fromkeys(_rated_names(study, group), study.learning_rates[0])
    return _walk(study, group, seed_recipe(study, group, rates), "evaluate", store, resources, data)


def _run(
    walks: Sequence[GraphRun], resources: Resources, view: ViewName, log: Path, sentences: Iterable[str] = ()
) -> None:
    names = [walk.shown(name) for walk in walks for name in walk.steps_wanted()]
    with open_run_view(view, names, log) as shown:
        for sentence in sentences:
            teller(shown.handle)(sentence)
        for walk in walks:
            walk.show_reused(shown.handle)
        if any(walk.missing() for walk in walks):
            planned = [walk.plan_memory(teller(shown.handle)) for walk in walks if walk.missing()]
            one = smallest(planned)
            for walk in walks:  # engines and workers go from one recipe to the next
                walk.resources = one.resources
            run_missing(walks, one.resources, shown.handle, log, one.budget_bytes)


def _rated_names(study: Study, group: Group) -> list[str]:
    return [arm_name(arm, n) for arm in group.arms for n in study.rated_sizes]


def _chosen(study: Study, group: Group, walk: GraphRun | None) -> dict[str, float] | None:
    """Arm of `rate_recipe` -> the rate with the lowest loss on held-out rows; None while a choice is not made."""
    names = _rated_names(study, group)
    if len(study.learning_rates) == 1:
        return dict.fromkeys(names, study.learning_rates[0])
    assert walk is not None, "several rates have been tried"
    manifests = {name: walk.states[f"choose:{name}"].manifest for name in names}
    rates = {
        name: manifest.summary["trials"][manifest.summary["chosen"]]["learning_rate"]
        for name, manifest in manifests.items()
        if manifest is not None
    }
    return rates if len(rates) == len(names) else None


def _summary(walk: GraphRun, step: str) -> dict[str, Any]:
    return _manifest(walk, step).summary


def _manifest(walk: GraphRun, step: str) -> Manifest:
    manifest = walk.states[step].manifest
    assert manifest is not None, f"{step} has been made"
    return manifest


def _rows(study: Study, group: Group, walk: GraphRun) -> list[dict[str, Any]]:
    """One per student and task."""
    manifests = {name: state.manifest for name, state in walk.states.items() if state.manifest is not None}
    scores = read_scores(walk.store, manifests)
    left_out = _left_out(scores)
    blocks = len(_summary(walk, "plan")["plan"]["keep_blocks"])
    rows = []
    for arm in group.arms:
        for num_rows in study.num_rows:
            for seed in study.seeds:
                name = arm_name(arm, num_rows, seed)
                facts = {
                    "variant": group.variant,
                    "metric": group.metric,
                    "remove_blocks": group.remove_blocks,
                    "num_blocks": blocks,
                    "arm": arm,
                    "num_rows": num_rows,
                    "seed": seed,
                    "learning_rate": walk.recipe.train.trials[name].learning_rate,
                    "held_out_loss": _summary(walk, f"train:{name}").get("held_out_loss"),
                }
                scored = _scored(scores, name, walk.recipe.evaluate.tuned)
                rows += [{**facts, **row} for row in scored if row["task"] not in left_out]
    return rows


def _left_out(scores: Mapping[str, Scores]) -> dict[str, str]:
    """Tasks that cannot be averaged, or have no values of items to pair, with the reason."""
    every = [score for own in scores.values() for score in own.tasks.values()]
    left_out = {score.task: "it has no values of items" for score in every if not score.items}
    return left_out | {score.task: score.not_averaged for score in every if score.not_averaged is not None}


def _scored(scores: Mapping[str, Scores], name: str, tuned: Collection[str]) -> list[dict[str, Any]]:
    teacher, pruned = scores["teacher"].tasks, scores["pruned"].tasks
    return [
        {
            "task": task,
            "tuned": task in tuned,
            "chance": score.chance,
            "score": score.value,
            "stderr": score.stderr,
            "n": score.n,
            "teacher_score": teacher[task].value,
            "pruned_score": pruned[task].value,
            "items": [score.items[item] for item in sorted(score.items)],
            "teacher_items": [teacher[task].items[item] for item in sorted(score.items)],
        }
        for task, score in scores[name].tasks.items()
    ]


def _shared(walks: Sequence[GraphRun]) -> Shared:
    wanted = [walk.states[name] for walk in walks for name in walk.steps_wanted()]
    manifests = {state.address: state.manifest for state in wanted if state.manifest is not None}
    executed = {walk.states[name].address for walk in walks for name in walk.executed}
    wall_s = sum(manifest.usage.wall_s for manifest in manifests.values())
    left_out = {}
    for walk in walks:
        known = {name: state.manifest for name, state in walk.states.items() if state.manifest is not None}
        left_out |= _left_out(read_scores(walk.store, known))
    return Shared(len(walks), len(wanted), len(manifests), len(executed), wall_s, left_out)
