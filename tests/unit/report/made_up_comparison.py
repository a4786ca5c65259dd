"""A store with two small runs whose evaluations were never made, for tests of comparisons."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.evaluation.items import ITEMS
from sdft_ray.statistics.scores import Scores, TaskScore
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of

GENERATED = ("gsm8k", "ifeval", "humaneval")
CHOSEN = ("mmlu", "hellaswag", "winogrande", "truthfulqa_mc1")
Values = Mapping[str, Sequence[float]]
"""Task -> value of each item."""


def drawn(accuracies: Mapping[str, float], num_items: int, *, seed: int, of: Values | None = None) -> Values:
    """Right or wrong by chance; with `of`, mostly as another model's, whose items are then lost at random."""
    generator = random.Random(seed)

    def value(task: str, item: int) -> float:
        if of is None or generator.random() < 0.15:
            return float(generator.random() < accuracies[task])
        return float(of[task][item] == 1 and generator.random() < accuracies[task])

    return {task: [value(task, item) for item in range(num_items)] for task in accuracies}


def task_score(task: str, values: Sequence[float], **changes: Any) -> TaskScore:
    """As lm-eval would sum up such items."""
    fields: dict[str, Any] = {
        "task": task,
        "metric": "exact_match" if task in GENERATED else "acc",
        "filter": "strict-match" if task in GENERATED else "none",
        "value": statistics.fmean(values),
        "stderr": statistics.stdev(values) / math.sqrt(len(values)),
        "n": len(values),
        "num_fewshot": 5 if task == "mmlu" else 0,
        "higher_is_better": True,
        "chance": 0.0 if task in GENERATED else 0.25,
        "items": {str(item): value for item, value in enumerate(values)},
    }
    return TaskScore(**{**fields, **changes})


def scores_of(values: Values, **changes: Mapping[str, Any]) -> Scores:
    """`changes` are fields of the task of that name."""
    return Scores({task: task_score(task, v, **changes.get(task, {})) for task, v in values.items()}, 0, "0.4.13")


def rows_of(values: Values, **texts: str) -> list[dict[str, Any]]:
    """What a model may have answered; `texts` replace columns of every row."""
    rows: list[dict[str, Any]] = []
    for task, found in values.items():
        for item, value in enumerate(found):
            written = task in GENERATED
            lost = written and value == 0 and item % 5 == 0
            answer = str(item) if value == 1 else str(item + 1)
            long = f"We begin with {item} plates and count them. So the answer is {answer}."
            row = {
                "task": task,
                "item": str(item),
                "prompt": f"Question {item}: there are {item} plates on the table. How many plates are there?\nAnswer:",
                "response": (long if not lost else "We begin, and we begin, and we")
                if written
                else f" {answer} plates",
                "filtered": "[invalid]" if lost else answer,
                "target": str(item),
                "value": value,
                "num_tokens": 20 + item % 7 if written else None,
                "truncated": lost and item % 2 == 0 if written else None,
                "no_answer": lost if written else None,
            }
            rows.append({**row, **texts})
    return rows


def evaluated(
    store: Store,
    run: str,
    model: str,
    scores: Scores,
    rows: Sequence[Mapping[str, Any]] | None,
    *,
    asked: Mapping[str, Any] | None = None,
    lm_eval: str = "0.4.13",
) -> Manifest:
    """A committed evaluation; without `rows` as earlier versions made it."""
    digest = hashlib.sha256(f"{run}/{model}".encode()).hexdigest()
    address = address_of("evaluate", digest)
    output = store.work(address) / "output"
    output.mkdir(parents=True)
    (output / files.SCORES).write_text(json.dumps(scores.to_json()), encoding="utf-8")
    if rows is not None:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], ITEMS), output / files.ITEMS)
    manifest = Manifest(
        step=f"evaluate:{model}",
        stage="evaluate",
        address=address,
        fingerprint=digest,
        identity=json.dumps({"recipe": {"tasks": [{"name": name} for name in scores.tasks], **(asked or {})}}),
        inputs={},
        files=store.place(address, output),
        usage=Usage(),
        versions={"lm_eval": lm_eval},
        created="2026-11-21T04:12:09+00:00",
    )
    store.commit(manifest)
    return manifest


def write_run(store: Store, name: str, manifests: Sequence[Manifest]) -> None:
    """Point a run at evaluations."""
    steps = {manifest.step: {"address": manifest.address, "skipped": False} for manifest in manifests}
    store.write_run(name, {"name": name, "recipe": "", "created": "", "wall_s": 0.0, "steps": steps})


ACCURACIES = {
    "gsm8k": 0.78, "ifeval": 0.7, "humaneval": 0.55, "mmlu": 0.68, "hellaswag": 0.8, "winogrande": 0.74,
    "truthfulqa_mc1": 0.4,
}  # fmt: skip
KEPT = {
    "pruned": dict.fromkeys(GENERATED, 0.08) | dict.fromkeys(CHOSEN, 0.85),
    "sft": dict.fromkeys(GENERATED, 0.6) | dict.fromkeys(CHOSEN, 0.93),
    "sdft": {"gsm8k": 0.92, "ifeval": 0.85, "humaneval": 0.8} | dict.fromkeys(CHOSEN, 0.99),
}


def make_values(num_items: int) -> dict[str, Values]:
    """Of a teacher, a pruned model and two students."""
    teacher = drawn(ACCURACIES, num_items, seed=0)
    others = {model: drawn(kept, num_items, seed=i, of=teacher) for i, (model, kept) in enumerate(KEPT.items(), 1)}
    return {"teacher": teacher, **others}


def make_store(folder: Path, num_items: int = 40) -> Store:
    """Run `small` with teacher, pruned model and two students; run `other` with the same teacher and an old student."""
    store, values = Store(str(folder)), make_values(num_items)
    made = [evaluated(store, "small", model, scores_of(v), rows_of(v)) for model, v in values.items()]
    write_run(store, "small", made)
    old = [evaluated(store, "other", "old", scores_of(values["sft"]), None), made[0]]
    write_run(store, "other", old)
    return store


def pair_of(folder: Path, second: Callable[[Store], Any], **first: Any) -> Store:
    """A store with one run `a` of one model `x`, and run `b` whose model `y` the function makes."""
    teacher = make_values(40)["teacher"]
    store = Store(str(folder / "pair"))
    made = evaluated(store, "a", "x", scores_of(teacher), first.pop("rows", rows_of(teacher)), **first)
    write_run(store, "a", [made])
    write_run(store, "b", [second(store)])
    return store
