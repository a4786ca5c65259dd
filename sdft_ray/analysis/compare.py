"""`sdft compare`: evaluated models side by side on the same items, and answers that changed."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdft_ray.errors import EvaluationError, StoreError
from sdft_ray.pipeline.run import Run
from sdft_ray.report.comparison.answers import Key, Mark, read_answers, read_marks
from sdft_ray.report.comparison.gather import Figures, is_right_or_wrong
from sdft_ray.report.comparison.model import Comparison, Example, Model
from sdft_ray.report.run.gather import read_scores, recoveries
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

NOT_STUDENTS = ("teacher", "pruned", "patched")


def compare(store: Store, names: Sequence[str], *, num_examples: int = 12, level: float = 0.95) -> Comparison:
    """Models of runs on the tasks that all of them were asked; the first named is the baseline.

    A name is RUN/MODEL, or RUN: all its models where nothing else is named, else its best student by mean recovery.
    `num_examples` changed items are shown at most for each other model and each direction. Raises `StoreError` for
    runs and models that are not there, and `EvaluationError` for fewer than two models and for such as were not asked
    the same in the same way.
    """
    models = _named(store, names)
    for pair in itertools.combinations(models, 2):
        _check_same(*pair)
    figures = Figures([own.scores for own in models], [own.marks for own in models], level)
    tasks = figures.tasks()
    return Comparison(
        models=tuple(own.model for own in models),
        tasks=tasks,
        means=figures.means(tasks, lambda task: task.kind),
        capabilities=figures.means(tasks, lambda task: task.capability),
        overall=next(iter(figures.means(tasks, lambda task: "all")), None),
        examples=tuple(example for other in models[1:] for example in _examples(models[0], other, num_examples)),
        level=level,
        harness=next((own.scores.harness for own in models if own.scores.harness), ""),
    )


@dataclass(frozen=True)
class _Evaluated:
    """A model with its scores, and how it was asked."""

    model: Model
    scores: Scores
    asked: Mapping[str, Any]
    """The part of the recipe that its evaluation depends on, without what is as by default."""
    answers: Path
    """A file that may be missing."""

    @cached_property
    def marks(self) -> dict[Key, Mark]:
        return read_marks(self.answers) if self.model.has_answers else {}


# --- from names to scores -----------------------------------------------------------------------------------


def _named(store: Store, names: Sequence[str]) -> list[_Evaluated]:
    runs: dict[str, Run] = {}
    pairs: list[tuple[str, str]] = []
    for name in names:
        run_name, _, role = name.partition("/")
        if run_name not in runs:
            runs[run_name] = _open(store, run_name)
        run = runs[run_name]
        known = _evaluations(run)
        if role and role not in known:
            raise StoreError(
                f"run {run_name} has no evaluated model {role!r}", f"it has {', '.join(known) or 'none yet'}"
            )
        if role:
            pairs.append((run_name, role))
        elif len(names) == 1:
            pairs += [(run_name, one) for one in sorted(known, key=lambda one: one != "teacher")]
        else:
            pairs.append((run_name, _best_student(run)))
    twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if twice:
        raise EvaluationError(f"{'/'.join(twice)} is named twice", "name each model once")
    if len(pairs) < 2:
        have = ", ".join("/".join(pair) for pair in pairs) or "none"
        raise EvaluationError(f"a comparison takes two models or more (named: {have})", "name another as RUN/MODEL")
    return [_read(runs[run], role, alone=len(runs) == 1) for run, role in pairs]


def _open(store: Store, name: str) -> Run:
    known = store.runs()
    if name not in known:
        head = name.partition(":")[0]
        near = [f"{head}/MODEL"] if head in known else difflib.get_close_matches(name, known, 3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"runs here: {', '.join(known) or 'none yet'}"
        raise StoreError(f"no run named {name!r} in {store.url}", hint)
    return Run.open(store, name)


def _evaluations(run: Run) -> dict[str, Manifest]:
    """By model, in the order of the run's steps."""
    parted = {step: step.partition(":") for step in run.manifests}
    return {model: run.manifests[step] for step, (stage, _, model) in parted.items() if stage == "evaluate"}


def _best_student(run: Run) -> str:
    found = recoveries(read_scores(run.store, run.manifests), ())
    means = {role: part.mean.value for role, part in found.items() if role not in NOT_STUDENTS}
    known = {role: mean for role, mean in means.items() if mean is not None}
    if not known:
        raise StoreError(
            f"run {run.name} has no student whose recovery is known",
            f"name a model as {run.name}/MODEL: {', '.join(_evaluations(run)) or 'none is evaluated yet'}",
        )
    return max(known, key=lambda role: known[role])


def _read(run: Run, role: str, *, alone: bool) -> _Evaluated:
    """`alone`: no other run is named, so that the role says which model it is."""
    manifest = _evaluations(run)[role]
    folder = run.store.path(manifest.address)
    scores = Scores.from_json(json.loads((folder / files.SCORES).read_text(encoding="utf-8")))
    harness = scores.harness or manifest.versions.get("lm_eval", "")
    asked = json.loads(manifest.identity).get("recipe", {})
    model = Model(
        run=run.name,
        role=role,
        name=role if alone else f"{run.name}/{role}",
        address=manifest.address,
        created=manifest.created,
        has_answers=(folder / files.ITEMS).exists(),
    )
    return _Evaluated(model, replace(scores, harness=harness), asked, folder / files.ITEMS)


def _check_same(first: _Evaluated, second: _Evaluated) -> None:
    """Raises `EvaluationError` unless both were asked the same items in the same way, and scored alike."""
    one, other = first.model.name, second.model.name
    again = "evaluate both in the same way"
    stray = next((t for t in (*first.scores.tasks, *second.scores.tasks) if _lacks(first, second, t)), None)
    if stray is not None:
        who, whom = (one, other) if stray in first.scores.tasks else (other, one)
        raise EvaluationError(f"{who} was asked {stray} and {whom} was not", "evaluate both on the same tasks")
    if first.scores.harness and second.scores.harness and first.scores.harness != second.scores.harness:
        told = f"{one} was evaluated with lm-eval {first.scores.harness}, {other} with {second.scores.harness}"
        raise EvaluationError(told, "scores of different versions differ; evaluate both with the same one")
    shots = any(score.num_fewshot for score in first.scores.tasks.values())
    for name in ("limit", "apply_chat_template", *(("seed",) if shots else ())):
        _refuse_unless_equal(one, other, name, first.asked.get(name, "default"), second.asked.get(name, "default"))
    for task, score in first.scores.tasks.items():
        beside = second.scores.tasks[task]
        for name in ("metric", "filter", "num_fewshot"):
            _refuse_unless_equal(one, other, f"{task}: {name}", getattr(score, name), getattr(beside, name))
        _refuse_unless_equal(one, other, f"{task}: number of items", score.n, beside.n)
        if score.items.keys() != beside.items.keys():
            raise EvaluationError(f"{one} and {other} were not asked the same items of {task}", again)
    for (task, item), mark in first.marks.items():
        if mark.target != second.marks.get((task, item), mark).target:
            raise EvaluationError(f"item {item} of {task} has another target for {one} than for {other}", again)


def _lacks(first: _Evaluated, second: _Evaluated, task: str) -> bool:
    return task not in first.scores.tasks or task not in second.scores.tasks


def _refuse_unless_equal(one: str, other: str, what: str, first: Any, second: Any) -> None:
    if first != second:
        raise EvaluationError(
            f"{one} and {other} were not evaluated alike ({what}: {first} against {second})",
            "evaluate both in the same way",
        )


# --- examples -----------------------------------------------------------------------------------------------


def _examples(first: _Evaluated, second: _Evaluated, num: int) -> list[Example]:
    """At most `num` items that the first alone gets right, then as many that the second alone does."""
    if not (first.model.has_answers and second.model.has_answers):
        return []
    shown = []
    for won in (False, True):
        kept = first.marks.keys() & second.marks.keys()
        keys = _spread([key for key in _changed(first.scores, second.scores, won=won) if key in kept], num)
        before, after = (read_answers(evaluated.answers, keys) for evaluated in (first, second))
        shown += [
            Example(
                other=second.model.name,
                task=task,
                item=item,
                won=won,
                prompt=before[task, item][0],
                target=first.marks[task, item].target,
                before=before[task, item][1],
                after=after[task, item][1],
            )
            for task, item in keys
        ]
    return shown


def _changed(first: Scores, second: Scores, *, won: bool) -> list[Key]:
    """Task by task, in an order that neither we nor the data set chose: that of their digests."""
    keys: list[Key] = []
    for task, score in first.tasks.items():
        other = second.tasks[task]
        if is_right_or_wrong(score) and is_right_or_wrong(other):
            wanted = (0.0, 1.0) if won else (1.0, 0.0)
            found = [(task, item) for item in score.items if (score.items[item], other.items[item]) == wanted]
            keys += sorted(found, key=_digest)
    return keys


def _digest(key: Key) -> str:
    return hashlib.sha256("/".join(key).encode()).hexdigest()


def _spread(keys: Sequence[Key], num: int) -> list[Key]:
    """Take turns between tasks until `num` are chosen; they keep their order."""
    seen: dict[str, int] = {}
    turns = []
    for place, (task, _) in enumerate(keys):
        turns.append((seen.get(task, 0), place))
        seen[task] = seen.get(task, 0) + 1
    return [keys[place] for place in sorted(place for _, place in sorted(turns)[:num])]
