"""From the artifacts of `forget` and `likeness` to what models have lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdft_ray.evaluation.forgetting import NAMES, verdict
from sdft_ray.evaluation.forgetting import forgetting as measured
from sdft_ray.evaluation.recovery import Estimate
from sdft_ray.evaluation.shift import ResponseNll
from sdft_ray.report.run.model import TEACHER, Forgetting, Likeness, Nats, Ratio
from sdft_ray.store import files
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

ByModel = dict[str, dict[str, Nats]]


def forgetting(store: Store, manifests: Mapping[str, Manifest]) -> Forgetting | None:
    """All models in the order of the steps; None where the teacher was not measured."""
    steps = {step.partition(":")[2]: manifest for step, manifest in manifests.items() if manifest.stage == "forget"}
    if TEACHER not in steps:
        return None
    found = measured({model: _rows(store, manifest) for model, manifest in steps.items()})
    return Forgetting(
        held_out=steps[TEACHER].summary["held_out"],
        num_rows=found.num_rows,
        nll=_nats(found.nll),
        to_teacher=_nats(found.to_teacher),
        to_pruned=_nats(found.to_pruned),
        perplexity_ratio={model: Ratio(value=e.value, stderr=e.stderr) for model, e in found.perplexity_ratio.items()},
        likeness={
            step.partition(":")[2]: Likeness.model_validate(manifest.summary)
            for step, manifest in manifests.items()
            if manifest.stage == "likeness"
        },
        verdicts={text: said for text in NAMES if (said := verdict(found, text))},
    )


def _rows(store: Store, manifest: Manifest) -> dict[str, dict[str, ResponseNll]]:
    told: dict[str, Any] = json.loads((store.path(manifest.address) / files.FORGET).read_text(encoding="utf-8"))
    return {text: {name: ResponseNll(**row) for name, row in rows.items()} for text, rows in told["rows"].items()}


def _nats(figures: Mapping[str, Mapping[str, Estimate]]) -> ByModel:
    return {model: {text: _figure(estimate) for text, estimate in texts.items()} for model, texts in figures.items()}


def _figure(estimate: Estimate) -> Nats:
    assert estimate.value is not None
    return Nats(value=estimate.value, stderr=estimate.stderr)
