"""Stage `measure`: one forward pass over the calibration set, sharded over Ray tasks by whole batches.

Metrics that ask for losses take more passes, of a model without some of its blocks. `best` goes over the set twice:
what it compares in the second round follows from the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import ray

from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.pruning.plan import resolve_num_removed
from sdft_ray.pruning.proposals import Proposal, proposals, sets_to_measure
from sdft_ray.stages.amounts import amounts, start_config
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, merge_usage, remote_options
from sdft_ray.store import files
from sdft_ray.store.manifest import Usage

if TYPE_CHECKING:
    from sdft_ray.importance.perplexity import DropMoments

NUM_PARTS = 16
"""Parts of the calibration rows whose sums are stored apart, to tell how much a choice depends on the rows."""
SAMPLE_ROWS, COMPARED_ROWS = 16, 128
"""Rows, spread over the calibration set, on which `best` looks for candidates by loss, and on which it compares all."""

Seen = dict[str, bytes]
"""What one task saw: file names of the artifact, each with moments that are merged by `+`."""


def run(job: StageContext) -> StageResult:
    """Spread batches over tasks, merge their sums by `+`, store the scores."""
    settings = job.resources.measure

    def everywhere(function: Callable[..., tuple[Seen, Usage]], *more: Any) -> list[tuple[Seen, Usage]]:
        task: Any = ray.remote(function).options(**remote_options(settings), max_retries=3)
        return ray.get([task.remote(job, index, settings.num_tasks, *more) for index in range(settings.num_tasks)])

    seen = everywhere(_shard)
    proposed = _proposals(job, seen)
    return _stored(job, seen, proposed, everywhere(_compared, proposed) if proposed else [])


def _merged(shards: Sequence[tuple[Seen, Usage]], name: str, read: Callable[[str], Any]) -> list[Any]:
    """The moments of each part of the rows, from all shards."""
    lists = [[read(json.dumps(part)) for part in json.loads(seen[name])] for seen, _ in shards]
    return [reduce(add, parts) for parts in zip(*lists, strict=True)]


def _drops(shards: Sequence[tuple[Seen, Usage]]) -> list[DropMoments]:
    from sdft_ray.importance.perplexity import DropMoments

    return _merged(shards, files.DROP_PARTS, DropMoments.from_json)


def _proposals(job: StageContext, shards: Sequence[tuple[Seen, Usage]]) -> list[Proposal]:
    """What `best` compares, from what the metrics saw; nothing for other metrics."""
    if not _num_dropped(job) or amounts(job)[0].metric != "best":
        return []
    scores = reduce(add, _merged(shards, files.DEPTH_PARTS, DepthMoments.from_json)).scores()
    return proposals(scores, reduce(add, _drops(shards)), start_config(job), _num_dropped(job))


def _stored(
    job: StageContext,
    shards: Sequence[tuple[Seen, Usage]],
    proposed: Sequence[Proposal] = (),
    compared: Sequence[tuple[Seen, Usage]] = (),
) -> StageResult:
    """What the shards saw, put together."""
    result = StageResult(usage=merge_usage([usage for _, usage in shards]))
    if compared:
        result.usage = _one_after_the_other(result.usage, merge_usage([usage for _, usage in compared]))
    parts = _merged(shards, files.DEPTH_PARTS, DepthMoments.from_json)
    moments = reduce(add, parts)
    scores = replace(moments.scores(), zero_tokens=_named(job, moments.zero_tokens))
    texts = {files.DEPTH_SCORES: scores.to_json(), files.DEPTH_PARTS: _listed(parts)}
    if files.DROP_PARTS in shards[0][0]:
        drops = _drops(shards)
        texts |= {files.DROP_LOSSES: reduce(add, drops).to_json(), files.DROP_PARTS: _listed(drops)}
    if compared:
        texts[files.PROPOSALS] = json.dumps([asdict(proposal) for proposal in proposed])
        texts[files.SET_LOSSES] = _set_losses([seen[files.SET_LOSSES].decode() for seen, _ in compared])
    result.summary = {"num_sequences": scores.num_sequences, "num_tokens": scores.num_tokens}
    if scores.zero_tokens:
        result.summary["zero_tokens"] = scores.zero_tokens
    with job.output(result) as directory:
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        if job.slice.get("channels"):
            contents = [seen[files.WIDTH_MOMENTS] for seen, _ in shards]
            (directory / files.WIDTH_MOMENTS).write_bytes(_channels(contents))
    return result


def _one_after_the_other(first: Usage, second: Usage) -> Usage:
    return Usage(
        first.wall_s + second.wall_s,
        first.device_s + second.device_s,
        max(first.peak_rss_bytes, second.peak_rss_bytes),
        first.num_tokens + second.num_tokens,
    )


def _listed(parts: Sequence[Any]) -> str:
    return f"[{','.join(part.to_json() for part in parts)}]"


def _set_losses(shards: Sequence[str]) -> str:
    """The losses of all rows without candidates, merged."""
    from sdft_ray.importance.perplexity import SetLosses

    return reduce(add, map(SetLosses.from_json, shards)).to_json()


def _named(job: StageContext, zero_tokens: Mapping[int, int]) -> dict[str, int]:
    """Counts by what a token is called: `'<unused0>' (id 5)`."""
    if not zero_tokens:
        return {}
    from sdft_ray.data.chat import load_tokenizer

    names = load_tokenizer(job.model("start")).convert_ids_to_tokens
    return {f"{names(token)!r} (id {token})": count for token, count in sorted(zero_tokens.items())}


def read_scores(job: StageContext, role: str = "measure") -> DepthScores:
    return DepthScores.from_json((job.input(role) / files.DEPTH_SCORES).read_text(encoding="utf-8"))


def _channels(parts: Sequence[bytes]) -> bytes:
    """The activity of channels, merged."""
    from sdft_ray.importance.width import WidthMoments

    return reduce(add, map(WidthMoments.from_bytes, parts)).to_bytes()


def _shard(job: StageContext, index: int, num_shards: int) -> tuple[Seen, Usage]:
    """What every `num_shards`-th batch shows of what the recipe asks for; all shards agree on the batches."""
    from sdft_ray.importance.depth import measure_parts
    from sdft_ray.importance.perplexity import DropMoments, drop_losses_of_parts
    from sdft_ray.importance.width import watched

    with UsageMeter(gpus=job.resources.measure.gpus) as meter:
        tell = job.part(str(index))
        mine, num_removed, model = calibration(job)[index::num_shards], _num_dropped(job), _model(job)
        is_best = bool(num_removed) and amounts(job)[0].metric == "best"
        for_losses = calibration(job, SAMPLE_ROWS)[index::num_shards] if is_best else mine if num_removed else []
        total = len(mine) + len(for_losses)
        moments = [DepthMoments.empty(model.config.num_hidden_layers)] * NUM_PARTS
        with watched(model) if job.slice.get("channels") else nullcontext() as watch:
            for done, batch in enumerate(mine, 1):
                moments = measure_parts(model, [(*batch[:2], batch.row_B)], moments, watch=watch)
                tell(done, total, "batches")
        seen = {files.DEPTH_PARTS: _listed(moments).encode()}
        if watch is not None:
            seen[files.WIDTH_MOMENTS] = watch.moments.to_bytes()
        if num_removed:
            losses = [DropMoments.empty(model.config.num_hidden_layers, num_removed)] * NUM_PARTS
            for done, batch in enumerate(for_losses, 1 + len(mine)):
                losses = drop_losses_of_parts(model, [batch], num_removed, losses)
                tell(done, total, "batches")
            seen[files.DROP_PARTS] = _listed(losses).encode()
    return seen, meter.usage(sum(part.num_tokens for part in moments))


def _compared(job: StageContext, index: int, num_shards: int, proposed: Sequence[Proposal]) -> tuple[Seen, Usage]:
    """The losses of the rows of every `num_shards`-th batch without each of the proposed sets of blocks."""
    from sdft_ray.importance.perplexity import SetLosses, set_losses

    with UsageMeter(gpus=job.resources.measure.gpus) as meter:
        mine, model, sets = calibration(job, COMPARED_ROWS)[index::num_shards], _model(job), sets_to_measure(proposed)
        losses, tell = SetLosses.empty(sets), job.part(f"candidates {index}")
        for done, batch in enumerate(mine, 1):
            losses = losses + set_losses(model, [batch], sets)
            tell(done, len(mine), "batches without candidates")
    return {files.SET_LOSSES: losses.to_json().encode()}, meter.usage()


def _model(job: StageContext) -> Any:
    """The model that pruning starts from, where it is measured."""
    from sdft_ray.models.loading import load_model

    job.phase("loading the model")
    model: Any = load_model(job.model("start"), job.teacher.dtype)
    return model.to("cuda" if job.resources.measure.gpus else "cpu")


def calibration(job: StageContext, max_rows: int | None = None) -> list[Any]:
    """The batches of the calibration set, or of at most `max_rows` of its rows, spread over it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sdft_ray.data.calibration import calibration_batches
    from sdft_ray.data.chat import load_tokenizer
    from sdft_ray.data.subset import spread

    rows = pq.read_table(job.input("calibration") / files.ROWS)
    return calibration_batches(
        rows if max_rows is None else rows.take(pa.array(spread(rows.num_rows, max_rows), pa.int64())),
        load_tokenizer(job.model("start")),
        max_tokens=job.slice["max_tokens"],
        batch_tokens=job.resources.measure.batch_tokens,
        chat=job.teacher.chat_settings,
    )


def _num_dropped(job: StageContext) -> int:
    """Blocks whose absence is measured at once; 0 where the recipe does not choose by that."""
    if "drops" not in job.slice:
        return 0
    return resolve_num_removed(amounts(job)[0], start_config(job))
