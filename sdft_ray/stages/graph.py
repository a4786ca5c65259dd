"""The stages as data: a diamond of steps, each with a version, a slice of the recipe, and its inputs.

    teacher, calibration → measure → plan → prune ┐
                                                  ├→ train:ARM (→ merge:NAME) → evaluate:ARM → report
    teacher, seed → generate → select ────────────┴→ gap

A recipe that prunes several times has `measure:step1` to `train:step1` before these, and so on; one whose target is a
speed has `rate`, and one that patches the cut has `patch` between prune and train. An arm with several rates or seeds
has a step `train:ARM@RATE#SEED` for each, and `choose:ARM`, whose output is that of the trial it chose. `gap` asks the
teacher alone, so it waits for no plan; `gap:pruned` asks the pruned model about the same rows. A teacher
that is corrected first takes `correct:teacher` and is measured by `gap:corrected`. A recipe with `forgetting` has
`texts`, `forget:MODEL` for every model that is evaluated, and, with an embedding model, `likeness:MODEL` for all but
the teacher.

Nothing is run here. `resolve` computes every address and says what is committed; it needs no GPU and no cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel

from sdft_ray.errors import DivergenceError
from sdft_ray.recipe.arms import Objective, Train
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.scoring import Speed
from sdft_ray.recipe.yaml_model import canonical, old_names
from sdft_ray.stages.names import StepName
from sdft_ray.stages.spec import STAGES
from sdft_ray.store.fingerprint import canonical_json, fingerprint
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store, address_of

_PRESENT_NAMES = old_names(Train) | old_names(Objective)
"""First name of a field, as in slices -> its present one, as in recipes."""
_MEASURED = {"angular_distance", "block_influence", "perplexity", "best"}
_MEASURED_BY_LOSS = {"perplexity", "best"}
"""Metrics whose measurement depends on how many blocks go."""


@dataclass(frozen=True)
class Step:
    """One node of the graph: a stage, applied to a subject.

    `slice` is what identity takes from the recipe, and all that the stage gets of it. `inputs` maps a role to the name
    of another step; `sources` names content from outside the store. `subject` and `trial` are those of `StepName`.
    """

    stage: str
    slice: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    subject: str = ""
    trial: str = ""
    must_be_patchable: bool = False
    """Of a plan: refuse one whose cuts no patch can stand in for. It decides whether there is an output, not which."""
    must_keep: bool = False
    """Of a generation and its selection: refuse to keep too few rewrites, because something is trained on them.
    Likewise."""
    row_tokens: int = 0
    """Of a generation: tokens of a packed row, which a rewrite that is kept fits with its prompt. Likewise."""

    @property
    def label(self) -> str:
        """See `StepName.label`."""
        return StepName(self.stage, self.subject, self.trial).label

    @property
    def name(self) -> str:
        return str(StepName(self.stage, self.subject, self.trial))


@dataclass(frozen=True)
class State:
    """A step in a store. `waits` names the value it needs before its address can be known."""

    step: Step
    status: Literal["done", "missing", "waits"]
    address: str = ""
    fingerprint: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    waits: str = ""


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """All steps of a recipe, every step after its inputs; the report comes last and reads all others."""
    *others, report = _steps(recipe)
    return (*others, replace(report, inputs={step.name: step.name for step in others}))


def _steps(recipe: Recipe) -> Iterator[Step]:
    replicate = _replicate(recipe)

    def cut(part: BaseModel, **options: Any) -> dict[str, Any]:
        return {**canonical(part, **options), **replicate}

    tasks = ("tasks",) if recipe.evaluate.include or recipe.evaluate.data else ()
    turns = {} if recipe.train.turns == "last" else {"turns": recipe.train.turns}
    seed = {**cut(recipe.seed_set, exclude={"source", "revision"}), **turns}
    if recipe.seed_set.decontaminate.ngram:
        # Which rows stay depends on the questions alone, not on how they are asked or scored.
        asked_about = {"tasks": sorted(task.name for task in recipe.evaluate.tasks)}
        yield Step("seed", {**seed, **asked_about}, sources=("seed_set", *tasks))
    else:
        yield Step("seed", seed, sources=("seed_set",))
    yield Step(
        "calibration",
        cut(recipe.calibration, exclude={"source", "revision", "max_tokens"}),
        sources=("calibration",),
    )
    yield from _prunings(recipe, cut)
    yield Step("gap", cut(recipe.gap), {"data": "select"}, ("teacher",))
    inputs = {"gap": "gap", "pruned": "prune", "data": "select"}
    yield Step("gap", _replicate(recipe), inputs, ("teacher",), "pruned")
    yield from _training(recipe, cut, "", _start_of(recipe, len(recipe.steps)))
    student = {
        name: f"{'train' if len(arm.trials) == 1 else 'choose'}:{name}" for name, arm in recipe.train.arms.items()
    }
    for name, (merge, t) in recipe.merged.items():
        first, second = merge.arms
        arms = {"first": student[first], "second": student[second]}
        yield Step("merge", {"kind": merge.kind, "t": t, **replicate}, arms, subject=name)
    patched = {"patched": "patch"} if recipe.patch else {}
    models = {"pruned": "prune", **patched, **student, **{name: f"merge:{name}" for name in recipe.merged}}
    asked = cut(recipe.evaluate, exclude={"tuned", "include", "data"})
    yield Step("evaluate", asked, {}, ("teacher", *tasks), subject="teacher")
    for name, step in models.items():
        yield Step("evaluate", asked, {"model": step}, ("teacher", *tasks), subject=name)
    yield from _forgetting(recipe, cut, models)
    yield Step("speed", cut(recipe.speed), {"pruned": "prune"}, ("teacher",))
    shown = {
        "name": recipe.name,
        "description": recipe.description,
        "tuned": list(recipe.evaluate.tuned),
        **_sizes_asked(recipe, cut),
        **({"release": cut(recipe.release)} if recipe.release else {}),
        "depth": cut(recipe.depth),  # a plan counts as its content, yet the page says how it was found
    }
    yield Step("report", shown, {}, ("gates",) if recipe.gates else ())


Cut = Callable[..., dict[str, Any]]
"""From a part of the recipe to its slice."""


def _prunings(recipe: Recipe, cut: Cut) -> Iterator[Step]:
    """Measuring, planning and surgery, as often as the recipe prunes; each time but the last, recovery.

    The teacher's own words and its correction, which recovery may want, are made in between: they wait for no pruning.
    """
    must_keep = recipe.trains_on_rewrites
    for number, (name, part) in enumerate(recipe.prunings.items()):
        start = _start_of(recipe, number)
        yield from _surgery(part, cut, name, start)
        if number == 0:
            row_tokens = recipe.train.max_seq_len
            asked, selected = cut(recipe.generate), {"row_tokens": row_tokens, **_replicate(recipe)}
            yield Step("generate", asked, {"seed": "seed"}, ("teacher",), must_keep=must_keep, row_tokens=row_tokens)
            inputs = {"seed": "seed", "generate": "generate"}
            yield Step("select", selected, inputs, ("teacher",), must_keep=must_keep)
            yield from _correction(recipe, cut)
        if name:
            yield from _training(part, cut, name, start)


def _start_of(recipe: Recipe, number: int) -> dict[str, str]:
    """The input that pruning `number` starts from; none for the first, which starts from the teacher."""
    return {"start": f"train:{list(recipe.prunings)[number - 1]}"} if number else {}


def _replicate(recipe: Recipe) -> dict[str, int]:
    return {} if recipe.replicate == 1 else {"replicate": recipe.replicate}


def _surgery(recipe: Recipe, cut: Cut, subject: str, start: dict[str, str]) -> Iterator[Step]:
    """From the model that pruning starts from to a smaller one; `subject` is the pruning's name, "" for the last."""

    def named(stage: str) -> str:
        return str(StepName(stage, subject))

    teacher = () if start else ("teacher",)
    sizes = _sizes_asked(recipe, cut)
    # Whoever prunes width wants the activity of channels, whichever of them then go.
    watched = {} if recipe.width is None else {"channels": True}
    rated = {}
    if recipe.target and recipe.target.is_measured:
        asked = {**sizes, "depth": cut(recipe.depth), "speed": _rated(recipe, cut)}
        yield Step("rate", asked, dict(start), teacher, subject)
        rated = {"rate": named("rate")}
    by_loss = recipe.depth.metric in _MEASURED_BY_LOSS
    dropped = {"drops": {**sizes, "depth": cut(recipe.depth)}} if by_loss else {}
    yield Step(
        "measure",
        {"max_tokens": recipe.calibration.max_tokens, **watched, **dropped, **_replicate(recipe)},
        {"calibration": "calibration", **start, **(rated if dropped else {})},
        teacher,
        subject,
    )
    measured = {"measure": named("measure")} if recipe.depth.metric in _MEASURED or recipe.width else {}
    yield Step(
        "plan",
        {**cut(recipe.depth), **sizes},
        {**measured, **start, **rated},
        teacher,
        subject,
        must_be_patchable=recipe.patch is not None,
    )
    plan = {"plan": named("plan")}
    yield Step("prune", _replicate(recipe), {**plan, **start}, teacher, subject)
    if recipe.patch:
        asked = {**cut(recipe.patch), "max_tokens": recipe.calibration.max_tokens}
        inputs = {**plan, **start, "pruned": named("prune"), "calibration": "calibration"}
        yield Step("patch", asked, inputs, teacher, subject)


def _sizes_asked(recipe: Recipe, cut: Cut) -> dict[str, Any]:
    """What a recipe says of sizes beside `depth`."""
    parts = {"width": recipe.width, "target": recipe.target}
    return {name: cut(part) for name, part in parts.items() if part is not None}


def _rated(recipe: Recipe, cut: Cut) -> dict[str, Any]:
    """What a target in speed is measured by: of all batch sizes the largest, left out where it is the default's."""
    largest = recipe.speed.largest_batch
    usual = {} if largest == Speed().largest_batch else {"batch_rows": largest}
    return {**cut(recipe.speed, exclude={"batch_rows"}), **usual}


_DATA = {"reference": "seed", "distilled": "select"}
"""What an arm trains on -> the step that makes it."""


def _correction(recipe: Recipe, cut: Cut) -> Iterator[Step]:
    """The teacher's own training, and how far that moved it."""
    train = recipe.correction
    if train is None:
        return
    (trial,) = train.trials.values()
    settings = {**cut(train, exclude={"arms"}), "arm": cut(trial)}
    yield Step("correct", settings, {"data": _DATA[trial.data]}, ("teacher",), "teacher")
    measured = {**cut(recipe.gap), **({"held_out": train.validation_fraction} if train.validation_fraction else {})}
    yield Step("gap", measured, {"corrected": "correct:teacher", "data": "select"}, ("teacher",), "corrected")


def _training(recipe: Recipe, cut: Cut, pruning: str, start: dict[str, str]) -> Iterator[Step]:
    """All trials of all arms, and the choice where an arm has several; `pruning` and `start` as in `_surgery`."""
    train = recipe.train
    pruned = str(StepName("patch" if recipe.patch else "prune", pruning))
    for arm, grid in train.arms.items():
        names = []
        for label, trial in grid.trials.items():
            inputs = {"pruned": pruned, "data": _DATA[trial.data]}
            if trial.objective.matches:
                inputs["plan"] = str(StepName("plan", pruning))  # the teacher's block behind each of the student's
            if trial.objective.cached:
                inputs["generate"] = "generate"  # what the teacher thought of each token
            if trial.objective.needs_teacher and start and recipe.distil_from == "previous":
                inputs["online_teacher"] = start["start"]
            elif trial.objective.needs_teacher and recipe.teacher_correction is not None:
                inputs["online_teacher"] = "correct:teacher"
            settings = {**cut(train, exclude={"arms"}), "arm": cut(trial)}
            step = Step("train", settings, inputs, ("teacher",), arm, label if len(grid.trials) > 1 else "")
            names.append(step.name)
            yield step
        if len(names) > 1:
            roles = {f"trial_{i}": name for i, name in enumerate(names, 1)}
            asked = [{"learning_rate": trial.learning_rate, "seed": trial.seed} for trial in grid.trials.values()]
            yield Step("choose", {"trials": asked}, roles, subject=arm)


def _forgetting(recipe: Recipe, cut: Cut, models: dict[str, str]) -> Iterator[Step]:
    """What each model has lost; `models` maps all but the teacher to the step that makes it."""
    part = recipe.forgetting
    if part is None:
        return
    elsewhere = {"source", "revision", "max_tokens", "embedding", "embedding_revision"}
    yield Step("texts", cut(part, exclude=elsewhere), sources=("forgetting",))
    held_out = {"held_out": recipe.train.validation_fraction} if recipe.train.validation_fraction else {}
    asked = {**cut(part, include={"max_tokens"}), "gap": cut(recipe.gap, include={"num_rows"}), **held_out}
    for name, step in ({"teacher": ""} | models).items():
        model = {"model": step} if step else {}
        yield Step("forget", asked, {**model, "texts": "texts", "data": "select"}, ("teacher",), name)
    for name in models if part.embedding else ():
        answers = {"teacher_answers": "evaluate:teacher", "answers": f"evaluate:{name}"}
        yield Step("likeness", _replicate(recipe), answers, ("embedding",), name)


def removal_step(recipe: Recipe, blocks: Sequence[int]) -> Step:
    """Beside the graph: what the model that the last pruning starts from scores without `blocks`."""
    listed = "+".join(map(str, blocks)) or "nothing"
    asked = canonical(recipe.evaluate, exclude={"tuned", "include", "data"})
    tasks = ("tasks",) if recipe.evaluate.include or recipe.evaluate.data else ()
    start = _start_of(recipe, len(recipe.steps))
    return Step("why", {"blocks": list(blocks), "evaluate": asked}, start, ("teacher", *tasks), listed)


IdentityOf = Callable[[str], Any]
"""From the name of a source (`teacher`, `seed_set`, ...) to what it counts as: a digest of its content, or a commit."""


def resolve(recipe: Recipe, store: Store, identity_of: IdentityOf) -> dict[str, State]:
    """The state of every step, by name, in order."""
    states: dict[str, State] = {}
    for step in steps(recipe):
        states[step.name] = resolve_step(step, states, identity_of, store)
    return states


def resolve_step(step: Step, states: dict[str, State], identity_of: IdentityOf, store: Store) -> State:
    """The state of one step whose inputs are in `states`."""
    roles: dict[str, Any] = {name: identity_of(name) for name in step.sources}
    for role, name in step.inputs.items():
        identity = output_identity(name, states)
        if identity is None:
            return State(step, "waits", waits=states[name].waits or name)
        roles[role] = identity
    identity = {"stage": step.stage, "version": STAGES[step.stage].version, "recipe": step.slice, "inputs": roles}
    digest = fingerprint(identity)
    address = address_of(step.stage, digest)
    manifest = store.manifest(address)
    return State(step, "done" if manifest else "missing", address, digest, identity, manifest)


def source_of(name: str, states: dict[str, State]) -> State:
    """The step whose artifact is the output of step `name`: itself, or the trial that a choice has chosen."""
    state = states[name]
    if STAGES[state.step.stage].output != "choice" or state.manifest is None:
        return state
    return states[state.step.inputs[state.manifest.summary["chosen"]]]


def output_identity(name: str, states: dict[str, State]) -> Any:
    """What a step's output counts as downstream: a plan is its content, a choice what it chose, data its recipe.

    None while unknown. A student that a grid chose is the one that a recipe with its rate and seed alone makes.
    """
    state = source_of(name, states)
    if state.status == "waits":
        return None
    stage = state.step.stage
    match STAGES[stage].output:
        case "value":
            return {stage: state.manifest.summary[stage]} if state.manifest else None
        case "choice":
            return None
        case _:
            return {"artifact": state.fingerprint}


def input_addresses(step: Step, states: dict[str, State]) -> dict[str, str]:
    """Role -> address: of a choice, where stages that read summaries read its own, and all others what it chose."""
    if STAGES[step.stage].reads_summaries:
        return {role: states[name].address for role, name in step.inputs.items()}
    return {role: source_of(name, states).address for role, name in step.inputs.items()}


def check_inputs(step: Step, states: dict[str, State]) -> None:
    """Raises `DivergenceError` where `step` wants the model of a trial that diverged, which has none.

    Stages that read summaries take such trials as they are.
    """
    if STAGES[step.stage].reads_summaries:
        return
    for name in step.inputs.values():
        source = source_of(name, states)
        reason = source.manifest.summary.get("diverged") if source.manifest else None
        if reason:
            raise DivergenceError(
                f"{name}: {reason}; the store has this trial at {source.address}",
                "lower the learning rate, or remove that folder to try again",
            )


def nearest(state: State, store: Store) -> tuple[Manifest, list[str]] | None:
    """The committed artifact of the same stage with the fewest differing fields, and those fields."""
    mine = _flat(json.loads(canonical_json(state.identity)))
    best: tuple[Manifest, list[str]] | None = None
    for manifest in store.manifests(state.step.stage):
        theirs = _flat(json.loads(manifest.identity))
        changed = [
            _difference(key, theirs, mine)
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]
        if best is None or len(changed) <= len(best[1]):
            best = (manifest, changed)
    return best


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def _difference(key: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    if key.startswith("inputs."):
        return key.split(".")[1]
    *parts, field_name = key.removeprefix("recipe.").split(".")
    name = ".".join([*parts, _PRESENT_NAMES.get(field_name, field_name)])
    return f"{name}: {before.get(key, 'default')} → {after.get(key, 'default')}"
