"""Stage `plan`: choose the blocks and channels to remove. Equal plans are one, however they were found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sdft_ray.importance.moments import DepthMoments
from sdft_ray.models.channels import Channels, narrowed_sizes
from sdft_ray.models.families import Config, family_of, num_blocks_of
from sdft_ray.pruning.plan import Measured, PruningPlan, choose_blocks
from sdft_ray.pruning.width import choose_channels, resolve_sizes
from sdft_ray.recipe.pruning import Depth, Width
from sdft_ray.stages.amounts import amounts, start_config
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.measure import read_scores
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.importance.perplexity import SetLosses


def run(job: StageContext) -> StageResult:
    """Choose within the budget and store the plan. Light: it runs in the driver."""
    result = StageResult()
    with UsageMeter() as meter, job.output(result) as directory:
        config = start_config(job)
        depth, width = amounts(job)
        plan = choose_blocks(depth, config, _scores(job, depth))
        if job.step.must_be_patchable:
            from sdft_ray.importance.patch import patch_gaps

            patch_gaps(plan.keep_blocks, num_blocks_of(config))
        if width is not None:
            plan = replace(plan, channels=_channels(job, width, config, plan.keep_blocks))
        (directory / files.PLAN).write_text(plan.to_json(), encoding="utf-8")
        result.summary = {"plan": plan.identity(), "widths": _widths(plan, config), **_certainty(job, depth, plan)}
    result.usage = meter.usage()
    return result


def _scores(job: StageContext, depth: Depth) -> Measured | None:
    """What the depth metric reads."""
    if "measure" not in job.inputs:
        return None
    if depth.metric == "perplexity":
        from sdft_ray.importance.perplexity import DropMoments

        return DropMoments.from_json(_read(job, files.DROP_LOSSES))
    return _set_losses(job) if depth.metric == "best" else read_scores(job)


def _set_losses(job: StageContext) -> SetLosses:
    from sdft_ray.importance.perplexity import SetLosses

    return SetLosses.from_json(_read(job, files.SET_LOSSES))


def _read(job: StageContext, name: str) -> str:
    """A file of the measurement; "" for one that an earlier version has not written."""
    path = job.input("measure") / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _certainty(job: StageContext, depth: Depth, plan: PruningPlan) -> dict[str, Any]:
    """How sure the choice of blocks is (`pruning.stability`), and, for `best`, what was compared.

    Nothing where nothing was measured, or by an earlier version.
    """
    from sdft_ray.pruning.stability import stability

    found: dict[str, Any] = {}
    if depth.metric == "best" and plan.removed_blocks:
        losses = _set_losses(job)
        figures = losses.candidates(plan.removed_blocks)
        proposed = json.loads(_read(job, files.PROPOSALS))
        found["candidates"] = [{**one, **figures[tuple(one["blocks"])]} for one in proposed]
        found["compared"] = {"whole_loss": losses.loss_C[0], "num_rows": len(losses.row_R)}
        sure = stability(*losses.parts(), losses.removed[1:])
    else:
        measured = _parts(job, depth, len(plan.removed_blocks))
        sure = stability(*measured) if measured else None
    return {**found, "stability": asdict(sure)} if sure else found


def _parts(job: StageContext, depth: Depth, num_removed: int) -> tuple[Any, Any, Any, int] | None:
    """By part of the rows: sums of scores and what they are over; the options, and how many of them were chosen."""
    name = files.DROP_PARTS if depth.metric == "perplexity" else files.DEPTH_PARTS
    has_scores = depth.metric in {"angular_distance", "block_influence", "perplexity"} and num_removed
    text = _read(job, name) if has_scores and "measure" in job.inputs else ""
    if not text:
        return None
    contents = [json.dumps(part) for part in json.loads(text)]
    by_block = depth.metric == "block_influence" or (depth.metric == "perplexity" and depth.drop == "one")
    if depth.metric == "perplexity":
        from sdft_ray.importance.perplexity import DropMoments

        drops = [DropMoments.from_json(content) for content in contents]
        parts = [((part.one_sum_L if by_block else part.run_sum_S).tolist(), part.num_tokens) for part in drops]
    else:
        moments = [DepthMoments.from_json(content) for content in contents]
        parts = [part.influence_sums() if by_block else part.run_sums(num_removed, depth.position) for part in moments]
    sums, weights = zip(*parts, strict=True)
    length = 1 if by_block else num_removed
    options = [tuple(range(start, start + length)) for start in range(len(sums[0]))]
    return sums, weights, options, num_removed if by_block else 1


def _widths(plan: PruningPlan, config: Config) -> dict[str, list[int]]:
    """Of every space that shrinks, how many members stay, and of how many."""
    sizes = family_of(config).space_sizes(config)
    narrow = narrowed_sizes(plan.channels, sizes)
    return {space: [narrow[space], size] for space, size in sizes.items() if narrow[space] != size}


def _channels(job: StageContext, width: Width, config: Config, keep_blocks: Sequence[int]) -> Channels:
    from sdft_ray.importance.width import SPACES, WidthMoments

    moments = WidthMoments.from_bytes((job.input("measure") / files.WIDTH_MOMENTS).read_bytes())
    scores = {space: moments.scores(space, width.over_tokens, width.over_sequences) for space in SPACES}
    return choose_channels(resolve_sizes(width, config), scores, config, keep_blocks)
