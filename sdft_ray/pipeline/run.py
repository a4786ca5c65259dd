"""A finished run, read back from the store: scores, recovery, sizes and stages, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_ray.errors import StoreError
from sdft_ray.evaluation.card import Reversal
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import parse_yaml
from sdft_ray.report.run.gather import gather
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.trainings import student_manifest
from sdft_ray.statistics.estimate import Interval, plain
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store


@dataclass(frozen=True)
class Run:
    """Named pointers to artifacts, and what they say together."""

    store: Store
    name: str
    record: Mapping[str, Any]
    manifests: Mapping[str, Manifest]

    @classmethod
    def open(cls, store: Store, name: str) -> Run:
        """Raises `StoreError` when there is no such run."""
        record = store.run(name)
        found = {step: store.manifest(entry["address"]) for step, entry in record["steps"].items()}
        return cls(store, name, record, {step: manifest for step, manifest in found.items() if manifest})

    @property
    def recipe(self) -> Recipe:
        return Recipe.parse(parse_yaml(self.record["recipe"]), origin=f"run {self.name}", stored=True)

    @property
    def report_path(self) -> Path:
        """The HTML page."""
        return self.store.path(self.manifests["report"].address) / files.REPORT

    def student_path(self, name: str) -> Path:
        """The checkpoint of an arm or a merge: a plain Hugging Face directory. Raises `StoreError`."""
        manifest = student_manifest(self.manifests, name)
        if manifest is None:
            raise StoreError(f"run {self.name} has no student {name!r}", "`sdft show NAME` lists the students of a run")
        return self.store.path(manifest.address)

    def stages(self) -> list[dict[str, Any]]:
        """Per step: name, address, wall seconds and peak memory of its making, and whether this run reused it."""
        return [
            {
                "name": step,
                "address": manifest.address,
                "wall_s": manifest.usage.wall_s,
                "peak_rss_bytes": manifest.usage.peak_rss_bytes,
                "skipped": self.record["steps"][step]["skipped"],
            }
            for step, manifest in self.manifests.items()
        ]

    def report_data(self) -> ReportData:
        """All that the report shows, as plain values."""
        skipped = [step for step, entry in self.record["steps"].items() if entry["skipped"]]
        gates = self.manifests["report"].summary["gates"]
        return gather(self.recipe, self.store, self.name, self.manifests, skipped=skipped, gates=gates)

    def to_json(self) -> dict[str, Any]:
        """For machines: `stages`, `scores`, `recovery` of all students, `release`, `reversals`, `gap`, `grids`,
        `correction`, `forgetting`, `flips` (from the teacher), `sizes`.

        Fractions are in [0, 1], intervals (`low` to `high`) at 95 %, None where they cannot be told.
        """
        data = self.report_data()
        cards = data.retention.students
        return {
            "name": self.name,
            "wall_s": self.record["wall_s"],
            "peak_rss_bytes": self.record["peak_rss_bytes"],
            "stages": self.stages(),
            "scores": {
                model: {task: {"value": s.value, "stderr": s.stderr, "n": s.n} for task, s in scores.items()}
                for model, scores in data.scores.items()
            },
            "recovery": {
                arm: {
                    "mean": data.recovery[arm].mean.value,
                    **_limits(cards[arm].recovery_interval if arm in cards else None),
                    "min": data.recovery[arm].min.value,
                }
                for arm in data.arm_names
                if arm in data.recovery
            },
            "release": {arm: plain(judgement) for arm, judgement in data.retention.judgements.items()},
            "reversals": {arm: [_reversal(reversal) for reversal in card.reversals] for arm, card in cards.items()},
            "gap": plain(data.gap) or {},
            "grids": {arm: grid.model_dump(mode="json") for arm, grid in data.grids.items()},
            "correction": plain(vars(data.correction)) if data.correction else {},
            "forgetting": plain(data.forgetting) or {},
            "flips": {arm: plain(card.flips) for arm, card in cards.items() if card.flips},
            "sizes": data.sizes.model_dump() if data.sizes else {},
            "report": str(self.report_path),
        }


def _limits(interval: Interval | None) -> dict[str, float | None]:
    return {"low": interval.low if interval else None, "high": interval.high if interval else None}


def _reversal(found: Reversal) -> dict[str, Any]:
    """A task on which a student is worse than the pruned model; `difference` is in units of the metric."""
    comparison = found.comparison
    return {
        "task": found.task,
        "difference": comparison.difference,
        **_limits(comparison.interval),
        "beyond_chance": found.is_beyond_chance,
    }
