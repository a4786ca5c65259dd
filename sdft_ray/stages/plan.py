"""Stage `plan`: choose the blocks and channels to remove. Equal plans are one, however they were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdft_ray.models.channels import Channels, narrowed_sizes
from sdft_ray.models.families import Config, family_of, num_blocks_of
from sdft_ray.pruning.plan import BlockScores, DropLosses, PruningPlan, choose_blocks
from sdft_ray.pruning.width import choose_channels, resolve_sizes
from sdft_ray.recipe.pruning import Depth, Width
from sdft_ray.stages.amounts import amounts, start_config
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.measure import read_scores
from sdft_ray.store import files


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
        result.summary = {"plan": plan.identity(), "widths": _widths(plan, config)}
    result.usage = meter.usage()
    return result


def _scores(job: StageContext, depth: Depth) -> BlockScores | DropLosses | None:
    """What the depth metric reads."""
    if "measure" not in job.inputs:
        return None
    if depth.metric == "perplexity":
        from sdft_ray.importance.perplexity import DropMoments

        return DropMoments.from_json((job.input("measure") / files.DROP_LOSSES).read_text(encoding="utf-8"))
    return read_scores(job)


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
