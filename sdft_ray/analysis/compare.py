"""`sdft compare`: evaluated models on the same items, and the answers that changed."""

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
from sdft_ray.stages.names import by_label
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.store import Store

NOT_STUDENTS = ("teacher", "pruned", "patched")


def compare(store: Store, names: Sequence[str], *, num_examples: int = 12, level: float = 0.95) -> Comparison:
    """Compare models of runs on their common tasks; the first name is the baseline.

    A name is RUN/MODEL, or RUN for its best student by mean recovery; a single RUN means all its models. At most
    `num_examples` changed items are listed per other model and direction. `level` is that of the intervals. Raises
    `StoreError` for unknown runs and models, and `EvaluationError` for fewer than two models and for models that were
    not evaluated on the same items in the same way.
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
    """A model with its scores and the settings of its evaluation."""

    model: Model
    scores: Scores
    settings: Mapping[str, Any]
    """The part of the recipe on which its evaluation depends, without defaults."""
    answers: Path
    """Path of its answers, which may not exist."""

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
        known = by_label(run.manifests, "evaluate")
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
    duplicate = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if duplicate:
        raise EvaluationError(f"{'/'.join(duplicate)} is given twice", "give each model once")
    if len(pairs) < 2:
        have = ", ".join("/".join(pair) for pair in pairs) or "none"
        raise EvaluationError(
            f"a comparison needs at least two models (given: {have})", "give another one as RUN/MODEL"
        )
    return [_read(runs[run], role, alone=len(runs) == 1) for run, role in pairs]


def _open(store: Store, name: str) -> Run:
    known = store.runs()
    if name not in known:
        head = name.partition(":")[0]
        near = [f"{head}/MODEL"] if head in known else difflib.get_close_matches(name, known, 3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"runs here: {', '.join(known) or 'none yet'}"
        raise StoreError(f"no run named {name!r} in {store.url}", hint)
    return Run.open(store, name)


def _best_student(run: Run) -> str:
    recovered = recoveries(read_scores(run.store, run.manifests), ())
    means = {role: part.mean.value for role, part in recovered.items() if role not in NOT_STUDENTS}
    known = {role: mean for role, mean in means.items() if mean is not None}
    if not known:
        evaluated = ", ".join(by_label(run.manifests, "evaluate")) or "none is evaluated yet"
        raise StoreError(f"run {run.name} has no evaluated student", f"give a model as {run.name}/MODEL: {evaluated}")
    return max(known, key=lambda role: known[role])


def _read(run: Run, role: str, *, alone: bool) -> _Evaluated:
    """`alone`: no other run is compared, so that the role is name enough."""
    manifest = by_label(run.manifests, "evaluate")[role]
    folder = run.store.path(manifest.address)
    scores = Scores.from_json(json.loads((folder / files.SCORES).read_text(encoding="utf-8")))
    harness = scores.harness or manifest.versions.get("lm_eval", "")
    settings = json.loads(manifest.identity).get("recipe", {})
    model = Model(
        run=run.name,
        role=role,
        name=role if alone else f"{run.name}/{role}",
        address=manifest.address,
        created=manifest.created,
        has_answers=(folder / files.ITEMS).exists(),
    )
    return _Evaluated(model, replace(scores, harness=harness), settings, folder / files.ITEMS)


def _check_same(first: _Evaluated, second: _Evaluated) -> None:
    """Raises `EvaluationError` unless both were evaluated on the same items, in the same way."""
    one, other = first.model.name, second.model.name
    again = "evaluate both with the same limit on the same version of the data"
    missing = next((t for t in (*first.scores.tasks, *second.scores.tasks) if _lacks(first, second, t)), None)
    if missing is not None:
        who, whom = (one, other) if missing in first.scores.tasks else (other, one)
        raise EvaluationError(f"{who} was evaluated on {missing}, {whom} was not", "evaluate both on the same tasks")
    if first.scores.harness and second.scores.harness and first.scores.harness != second.scores.harness:
        message = f"{one} was evaluated with lm-eval {first.scores.harness}, {other} with {second.scores.harness}"
        raise EvaluationError(message, "scores of two versions are not comparable; evaluate both with the same one")
    shots = any(score.num_fewshot for score in first.scores.tasks.values())
    for name in ("limit", "apply_chat_template", *(("seed",) if shots else ())):
        _refuse_unless_equal(
            one, other, name, first.settings.get(name, "default"), second.settings.get(name, "default")
        )
    for task, score in first.scores.tasks.items():
        beside = second.scores.tasks[task]
        for name in ("metric", "filter", "num_fewshot"):
            _refuse_unless_equal(one, other, f"{task}: {name}", getattr(score, name), getattr(beside, name))
        _refuse_unless_equal(one, other, f"{task}: number of items", score.n, beside.n)
        if score.items.keys() != beside.items.keys():
            raise EvaluationError(f"{one} and {other} were evaluated on different items of {task}", again)
    for (task, item), mark in first.marks.items():
        if mark.target != second.marks.get((task, item), mark).target:
            raise EvaluationError(f"item {item} of {task} has different targets for {one} and {other}", again)


def _lacks(first: _Evaluated, second: _Evaluated, task: str) -> bool:
    return task not in first.scores.tasks or task not in second.scores.tasks


def _refuse_unless_equal(one: str, other: str, what: str, first: Any, second: Any) -> None:
    if first != second:
        raise EvaluationError(
            f"{one} and {other} were evaluated with different settings ({what}: {first} and {second})",
            "evaluate both with the same settings",
        )


# --- examples -----------------------------------------------------------------------------------------------


def _examples(first: _Evaluated, second: _Evaluated, num: int) -> list[Example]:
    """At most `num` items that only the first model gets right, then as many that only the second does."""
    if not (first.model.has_answers and second.model.has_answers):
        return []
    examples = []
    for won in (False, True):
        common = first.marks.keys() & second.marks.keys()
        keys = _spread([key for key in _changed(first.scores, second.scores, won=won) if key in common], num)
        before, after = (read_answers(evaluated.answers, keys) for evaluated in (first, second))
        examples += [
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
    return examples


def _changed(first: Scores, second: Scores, *, won: bool) -> list[Key]:
    """Items that changed, task by task, in the order of their digests, which nobody chose."""
    keys: list[Key] = []
    for task, score in first.tasks.items():
        other = second.tasks[task]
        if is_right_or_wrong(score) and is_right_or_wrong(other):
            pair = (0.0, 1.0) if won else (1.0, 0.0)
            changed = [(task, item) for item in score.items if (score.items[item], other.items[item]) == pair]
            keys += sorted(changed, key=_digest)
    return keys


def _digest(key: Key) -> str:
    return hashlib.sha256("/".join(key).encode()).hexdigest()


def _spread(keys: Sequence[Key], num: int) -> list[Key]:
    """Choose `num` items round-robin over the tasks, in their original order."""
    counts: dict[str, int] = {}
    turns = []
    for place, (task, _) in enumerate(keys):
        turns.append((counts.get(task, 0), place))
        counts[task] = counts.get(task, 0) + 1
    return [keys[place] for place in sorted(place for _, place in sorted(turns)[:num])]
