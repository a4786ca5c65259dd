"""A finished run of tiny models in a store, made without Ray: what `sdft show`, a model card and a release read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdft_ray.pipeline.run import Run
from sdft_ray.store import files
from sdft_ray.store.fingerprint import canonical_json, fingerprint
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model

CORRECT = {
    "teacher": {"tiny_task": "1111111100", "tiny_words": "1111111110"},
    "pruned": {"tiny_task": "1010100000", "tiny_words": "1000000000"},
    "sft": {"tiny_task": "1111000000", "tiny_words": "1111000000"},
    "sdft": {"tiny_task": "1111110000", "tiny_words": "1111100010"},
}
"""Model -> task -> its items, 1 where the answer is right."""
CHANCE = {"tiny_task": 0.25, "tiny_words": 0.0}
REASONS = {"kept": 5, "mismatch": 1}
SIZES = {
    "teacher": {"num_blocks": 4, "num_parameters": 4000, "matmul_flops_per_token": 8000, "kv_bytes_per_token": 512,
                "weight_bytes": 16000},
    "pruned": {"num_blocks": 3, "num_parameters": 3000, "matmul_flops_per_token": 6100, "kv_bytes_per_token": 384,
               "weight_bytes": 12000},
}  # fmt: skip
VERSIONS = {"python": "3.11.7", "sdft_ray": "0.1.0", "torch": "2.13.0"}


def finished_run(
    folder: Path, *, sources: Mapping[str, Any] | None = None, correct: Mapping[str, Any] = CORRECT, **changes: Any
) -> Run:
    """Run `quick` in `folder/store`: a teacher of four blocks, students `sft` and `sdft` of three, both trained.

    `sources` replaces what teacher and seed set counted as; `changes` are parts of the recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {"teacher": {"content": "a1" * 32}, "seed_set": {"content": "b2" * 32}, **(sources or {})}
    tasks = {"tasks": [{"name": task} for task in next(iter(correct.values()))]}
    data = recipe_data(folder, folder / "teacher", evaluate=tasks, depth={"blocks": [2], "metric": "explicit"})
    made = _Maker(Store(str(folder / "store")), folder / "made", known)
    recipe = made.recipe({**data, **changes})
    made.commit("seed", {"seed_set"}, {"num_rows": 6})
    made.commit("plan", {"teacher"}, {"plan": {"num_blocks": 4, "keep_blocks": [0, 1, 3]}, "widths": {}})
    made.commit("prune", {"teacher"}, {"sizes": SIZES}, make_model(folder / "made/prune", num_blocks=3, seed=7))
    made.commit("generate", {"teacher"}, {"response_tokens": 321, "num_failed": 0, "finish_reasons": {"stop": 6}})
    made.commit("select", {"teacher"}, {"reasons": REASONS}, _selected(folder / "made/select"))
    for seed, arm in enumerate(recipe.train.arms, 1):
        made.commit(f"train:{arm}", {"teacher"}, {"num_steps": 2}, _student(folder / "made" / arm, seed))
    for name in recipe.merged:
        made.commit(f"merge:{name}", set(), {"kind": "slerp"}, _student(folder / "made" / name, 9))
    for model, items in correct.items():
        made.commit(f"evaluate:{model}", {"teacher"}, {}, _scores(folder / "made/scores" / model, items))
    made.commit("report", set(), {"gates": []})
    made.store.write_run("quick", {
        "name": "quick", "recipe": recipe.to_yaml(), "created": "2026-11-22T20:33:29+00:00", "wall_s": 1.0,
        "peak_rss_bytes": 0, "steps": made.steps,
    })  # fmt: skip
    return Run.open(made.store, "quick")


class _Maker:
    """Commits artifacts, and remembers their steps."""

    def __init__(self, store: Store, folder: Path, sources: Mapping[str, Any]) -> None:
        self.store, self.steps, self._sources = store, {}, sources
        folder.mkdir(parents=True, exist_ok=True)

    def recipe(self, data: dict[str, Any]) -> Any:
        from sdft_ray.recipe.recipe import Recipe

        return Recipe.parse(data)

    def commit(self, step: str, sources: set[str], summary: dict[str, Any], content: Path | None = None) -> None:
        digest, stage = fingerprint({"step": step}), step.partition(":")[0]
        address = address_of(stage, digest)
        output = self.store.work(address) / "output"
        if content is None:
            output.mkdir()
        else:
            shutil.copytree(content, output)
        placed = self.store.place(address, output)
        identity = canonical_json({"stage": stage, "inputs": {name: self._sources[name] for name in sorted(sources)}})
        self.store.commit(
            Manifest(step, stage, address, digest, identity, {}, placed, Usage(), summary, versions=VERSIONS,
                     created="2026-11-22T20:33:00+00:00")
        )  # fmt: skip
        self.steps[step] = {"address": address, "skipped": False}


def _student(folder: Path, seed: int) -> Path:
    make_model(folder, num_blocks=3, seed=seed, max_shard_bytes=40_000)
    line = {"step": 1, "loss": 1.0, "learning_rate": 1e-3}
    (folder / files.HISTORY).write_text(json.dumps(line) + "\n", encoding="utf-8")
    return folder


def _selected(folder: Path) -> Path:
    names = ("example_id", "instruction", "reference_response", "distilled_response", "family")
    rows = [
        {**dict.fromkeys(names, f"text {index}"), "reason": reason}
        for index, reason in enumerate(reason for reason, num in REASONS.items() for _ in range(num))
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / files.DISTILLED)
    return folder


def _scores(folder: Path, items: Mapping[str, str]) -> Path:
    tasks = {}
    for task, marks in items.items():
        values = {str(index): float(mark) for index, mark in enumerate(marks)}
        share = sum(values.values()) / len(values)
        written = {
            "num_answers": len(values),
            "mean_tokens": 12.5,
            "truncated": 0.1,
            "no_answer": 0.2,
            "repetition": 0.3,
        }
        chance = CHANCE.get(task, 0.0)
        tasks[task] = {
            "task": task, "metric": "acc" if chance else "exact_match", "filter": "none", "value": share,
            "stderr": (share * (1 - share) / (len(values) - 1)) ** 0.5, "n": len(values), "num_fewshot": 5,
            "higher_is_better": True, "chance": chance, "outputs": [], "items": values,
            "written": None if chance else written,
        }  # fmt: skip
    folder.mkdir(parents=True)
    text = json.dumps({"tasks": tasks, "num_truncated": 0, "harness": "0.4.13"})
    (folder / files.SCORES).write_text(text, encoding="utf-8")
    return folder
