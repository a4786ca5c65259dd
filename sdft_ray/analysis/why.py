"""`sdft why`: the measurements behind a run's choice of blocks and channels, and the cost of other choices."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdft_ray.errors import StoreError
from sdft_ray.pipeline.compress import block_removal_scores
from sdft_ray.pruning.alternatives import removals
from sdft_ray.report.run.cut_words import UNITS
from sdft_ray.report.run.model import Plan
from sdft_ray.report.run.why import Candidate, Channel, Why
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.pipeline.run import Run
    from sdft_ray.pruning.plan import DropLosses, SetLosses
    from sdft_ray.recipe.resources import Resources


def why(
    run: Run,
    resources: Resources | None = None,
    *,
    num_candidates: int = 5,
    limit: int | None = 50,
    ask_tasks: bool = True,
    view: Any = "auto",
) -> Why:
    """The blocks and channels that a run's last pruning removed, and the best `num_candidates` removals by its metric.

    With `ask_tasks`, each of them is evaluated on `limit` items of every task of the recipe, without training; results
    are stored. Raises `StoreError` for a run without a plan, and as `compress`.
    """
    data = run.report_data()
    plan, distances = data.plan, data.distances
    if plan is None or distances is None:
        raise StoreError(f"run {run.name} has no plan yet", "complete it with sdft compress first")
    depth, losses = run.recipe.depth, _losses(run)
    candidates: list[Candidate] = []
    ranked, whole = [], None
    if plan.removed_blocks:
        ranked = removals(depth, distances, losses, plan.num_blocks, len(plan.removed_blocks))
        chosen = [removal for removal in ranked if removal.blocks == plan.removed_blocks]
        others = [removal for removal in ranked if removal.blocks != plan.removed_blocks]
        first = sorted([*chosen, *others[: num_candidates - len(chosen)]], key=lambda removal: removal.score)
        metrics = {candidate.blocks: candidate.metrics for candidate in plan.candidates}
        candidates = [
            Candidate(r.blocks, r.score, chosen=r.blocks == plan.removed_blocks, metrics=metrics.get(r.blocks, ()))
            for r in first
        ]
        if not chosen:  # a metric without scores may remove blocks that are not consecutive
            candidates.append(Candidate(plan.removed_blocks, None, chosen=True))
    if ask_tasks and candidates:
        options = [(), *(candidate.blocks for candidate in candidates)]
        whole, *scores = block_removal_scores(run, options, resources, limit=limit, view=view)
        candidates = [replace(candidate, scores=score) for candidate, score in zip(candidates, scores, strict=True)]
    return Why(
        plan=plan,
        distances=distances,
        unit=UNITS.get(depth.metric, "mean angular distance"),
        candidates=tuple(candidates),
        num_candidates=len(ranked),
        whole=whole,
        channels=_channels(run, plan),
    )


def _losses(run: Run) -> DropLosses | SetLosses | None:
    """What a metric that goes by losses has measured."""
    folder = run.store.path(run.manifests["measure"].address)
    if run.recipe.depth.metric == "best":
        from sdft_ray.importance.perplexity import SetLosses

        return SetLosses.from_json((folder / files.SET_LOSSES).read_text(encoding="utf-8"))
    if run.recipe.depth.metric != "perplexity":
        return None
    from sdft_ray.importance.perplexity import DropMoments

    return DropMoments.from_json((folder / files.DROP_LOSSES).read_text(encoding="utf-8"))


def _channels(run: Run, plan: Plan) -> tuple[Channel, ...]:
    """For every pruned space: the share of activity that was removed, and the margin of the choice."""
    width = run.recipe.width
    if width is None:
        return ()
    import numpy as np

    from sdft_ray.importance.width import SPACES, WidthMoments
    from sdft_ray.pruning.plan import PruningPlan

    folder = run.store.path(run.manifests["measure"].address)
    moments = WidthMoments.from_bytes((folder / files.WIDTH_MOMENTS).read_bytes())
    chosen = PruningPlan.from_json(
        (run.store.path(run.manifests["plan"].address) / files.PLAN).read_text(encoding="utf-8")
    )
    channels = []
    for space in SPACES:
        members = getattr(chosen.channels, space)
        if members is None:
            continue
        scores = moments.scores(space, width.over_tokens, width.over_sequences)
        rows = (
            [(scores, members)]
            if space == "hidden"
            else [(scores[block], indices) for block, indices in zip(chosen.keep_blocks, members, strict=True)]
        )
        removed, margin, total = 0.0, float("inf"), 0.0
        for values, indices in rows:
            stays = np.zeros(len(values), dtype=bool)
            stays[list(indices)] = True
            removed, total = removed + float(values[~stays].sum()), total + float(values.sum())
            margin = min(margin, float(values[stays].min() / max(values[~stays].max(), 1e-30)))
        channels.append(Channel(space, *plan.widths[space], removed / total, margin))
    return tuple(channels)


def why_json(content: Why) -> str:
    """As JSON: candidates in order, each with its blocks, score and scores per task; fractions are in [0, 1]."""
    return json.dumps(
        {
            "removed": content.plan.removed_blocks,
            "metric": content.plan.metric,
            "unit": content.unit,
            "whole": content.whole,
            "candidates": [vars(candidate) for candidate in content.candidates],
            "compared": [candidate.model_dump() for candidate in content.plan.candidates],
            "stability": content.plan.stability and content.plan.stability.model_dump(),
            "channels": [vars(channel) for channel in content.channels],
        }
    )
