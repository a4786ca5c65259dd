"""From the files of a training to what the report says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.report.run.gather import gather
from sdft_ray.report.run.model import Cost
from sdft_ray.report.run.words import cost_notes
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of
from tests.support.recipes import make_recipe

OLD = [{"step": step, "loss": 2.0 / step, "learning_rate": 0.1, "wall_s": 0.5} for step in (1, 2, 3)]
COSTS: list[dict[str, Any]] = [
    {"tokens_per_s": 10.0, "mfu": 0.1, "peak_memory_bytes": 100},
    {"tokens_per_s": 1000.0, "mfu": None, "peak_memory_bytes": 2048},
    {"tokens_per_s": 1200.0, "mfu": 0.3, "peak_memory_bytes": 1024},
]
NEW = [record | cost for record, cost in zip(OLD, COSTS, strict=True)]


def trained(store: Store, arm: str, records: list[dict[str, Any]]) -> Manifest:
    """A committed training that has nothing but its history."""
    digest = arm.encode().hex().ljust(64, "0")
    address = address_of("train", digest)
    output = store.work(address) / "output"
    output.mkdir(parents=True)
    (output / files.HISTORY).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    placed = store.place(address, output)
    manifest = Manifest(f"train:{arm}", "train", address, digest, "{}", {}, placed, Usage())
    store.commit(manifest)
    return manifest


def test_costs_of_new_histories_and_silence_about_old_ones(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    made = (trained(store, "sft", OLD), trained(store, "sdft", NEW))
    recipe = make_recipe(tmp_path, tmp_path / "teacher")
    data = gather(recipe, store, "run", {manifest.step: manifest for manifest in made})
    assert [point.loss for point in data.loss_curves["sft"]] == [2.0, 1.0, pytest.approx(2 / 3)]
    assert data.loss_curves["sft"] == data.loss_curves["sdft"]
    assert data.training_costs == {
        "sft": Cost(),
        "sdft": Cost(tokens_per_s=1000.0, mfu=0.2, peak_memory_bytes=2048),
    }
    words = {name: note.replace("\u202f", " ") for name, note in cost_notes(data).items()}
    assert words == {"sdft": "1,000 tokens/s, 20.0 % of the devices’ peak (MFU), at most 2.00 KiB per process"}


def asked(step: str, model: str, value: float, **more: Any) -> Manifest:
    """What `gap` says of one model."""
    one = {"value": value, "stderr": 0.1}
    summary = {
        "num_kept": 90, "num_rows": 64, "gaps": {model: one}, **more,
        "nll": {model: {"reference": one, "distilled": one}},
    }  # fmt: skip
    return Manifest(
        step, "gap", address_of("gap", step.encode().hex().ljust(64, "0")), "0" * 64, "{}", {}, {}, Usage(), summary
    )


def test_the_gap_has_the_pruned_model_as_soon_as_it_was_asked(tmp_path: Path) -> None:
    store, recipe = Store(str(tmp_path / "store")), make_recipe(tmp_path, tmp_path / "teacher")
    made = {"gap": asked("gap", "teacher", 0.5, verdict="It pays.")}
    alone = gather(recipe, store, "run", made).gap
    both = gather(recipe, store, "run", made | {"gap:pruned": asked("gap:pruned", "pruned", 1.5)}).gap
    assert alone is not None
    assert both is not None
    assert (list(alone.nll), list(both.nll), list(both.gaps)) == (
        ["teacher"],
        ["teacher", "pruned"],
        ["teacher", "pruned"],
    )
    assert both.verdict == alone.verdict == "It pays."
    assert (both.gaps["teacher"].value, both.gaps["pruned"].value) == (0.5, 1.5)
    assert gather(recipe, store, "run", {}).gap is None
