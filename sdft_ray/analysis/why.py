"""`sdft why`: the evidence behind a run's choice of blocks and channels, and what other choices would have cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdft_ray.errors import StoreError
from sdft_ray.pipeline.compress import damage
from sdft_ray.pruning.alternatives import removals
from sdft_ray.report.run.model import Distances, Plan
from sdft_ray.report.run.why import Candidate, Channel, Why
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.pipeline.run import Run
    from sdft_ray.pruning.plan import DropLosses
    from sdft_ray.recipe.resources import Resources

UNITS = {
    "angular_distance": "angular distance",
    "block_influence": "sum of block influences",
    "perplexity": "nats per token without them",
}


def why(
    run: Run,
    resources: Resources | None = None,
    *,
    num_candidates: int = 5,
    limit: int | None = 50,
    ask_tasks: bool = True,
    view: Any = "auto",
) -> Why:
    """What a run's last pruning took, and the `num_candidates` removals that its metric likes best.

    With `ask_tasks` each of them is evaluated on `limit` items of every task of the recipe, nothing trained; answers
    are kept in the store. Raises `StoreError` for a run without a plan, and as `compress`.
    """
    data = run.report_data()
    plan, distances = data.plan, data.distances
    if plan is None or distances is None:
        raise StoreError(f"run {run.name} has no plan yet", "run its recipe to the end first")
    depth, losses = run.recipe.depth, _losses(run)
    candidates: list[Candidate] = []
    ranked, whole = [], None
    if plan.removed_blocks:
        ranked = removals(depth, _Scores(distances), losses, plan.num_blocks, len(plan.removed_blocks))
        chosen = [removal for removal in ranked if removal.blocks == plan.removed_blocks]
        others = [removal for removal in ranked if removal.blocks != plan.removed_blocks]
        first = sorted([*chosen, *others[: num_candidates - len(chosen)]], key=lambda removal: removal.score)
        candidates = [Candidate(r.blocks, r.score, chosen=r.blocks == plan.removed_blocks) for r in first]
        if not chosen:  # a metric that measures nothing may take what no run of blocks is
            candidates.append(Candidate(plan.removed_blocks, None, chosen=True))
    if ask_tasks and candidates:
        asked = [(), *(candidate.blocks for candidate in candidates)]
        whole, *found = damage(run, asked, resources, limit=limit, view=view)
        candidates = [
            Candidate(c.blocks, c.score, scored, c.chosen) for c, scored in zip(candidates, found, strict=True)
        ]
    return Why(
        plan=plan,
        distances=distances,
        unit=UNITS.get(depth.metric, "mean angular distance"),
        candidates=tuple(candidates),
        num_candidates=len(ranked),
        whole=whole,
        channels=_channels(run, plan),
    )


@dataclass(frozen=True)
class _Scores:
    """The report's distances under the names that metrics read."""

    shown: Distances

    @property
    def angular_last_LN(self) -> Sequence[Sequence[float | None]]:
        return self.shown.angular_last

    @property
    def angular_mean_LN(self) -> Sequence[Sequence[float | None]]:
        return self.shown.angular_mean

    @property
    def block_influence_L(self) -> Sequence[float]:
        return self.shown.block_influence


def _losses(run: Run) -> DropLosses | None:
    if run.recipe.depth.metric != "perplexity":
        return None
    from sdft_ray.importance.perplexity import DropMoments

    folder = run.store.path(run.manifests["measure"].address)
    return DropMoments.from_json((folder / files.DROP_LOSSES).read_text(encoding="utf-8"))


def _channels(run: Run, plan: Plan) -> tuple[Channel, ...]:
    """Of every space that shrank, how much activity went, and by how little."""
    asked = run.recipe.width
    if asked is None:
        return ()
    import numpy as np

    from sdft_ray.importance.width import SPACES, WidthMoments
    from sdft_ray.pruning.plan import PruningPlan

    folder = run.store.path(run.manifests["measure"].address)
    moments = WidthMoments.from_bytes((folder / files.WIDTH_MOMENTS).read_bytes())
    chosen = PruningPlan.from_json(
        (run.store.path(run.manifests["plan"].address) / files.PLAN).read_text(encoding="utf-8")
    )
    found = []
    for space in SPACES:
        members = getattr(chosen.channels, space)
        if members is None:
            continue
        scores = moments.scores(space, asked.over_tokens, asked.over_sequences)
        rows = (
            [(scores, members)]
            if space == "hidden"
            else [(scores[block], kept) for block, kept in zip(chosen.keep_blocks, members, strict=True)]
        )
        gone, margin, everything = 0.0, float("inf"), 0.0
        for values, kept in rows:
            stays = np.zeros(len(values), dtype=bool)
            stays[list(kept)] = True
            gone, everything = gone + float(values[~stays].sum()), everything + float(values.sum())
            margin = min(margin, float(values[stays].min() / max(values[~stays].max(), 1e-30)))
        found.append(Channel(space, *plan.widths[space], gone / everything, margin))
    return tuple(found)


def why_json(content: Why) -> str:
    """For machines: candidates in order, each with its blocks, score and scores by task; fractions in [0, 1]."""
    return json.dumps(
        {
            "removed": content.plan.removed_blocks,
            "metric": content.plan.metric,
            "unit": content.unit,
            "whole": content.whole,
            "candidates": [vars(candidate) for candidate in content.candidates],
            "channels": [vars(channel) for channel in content.channels],
        }
    )
