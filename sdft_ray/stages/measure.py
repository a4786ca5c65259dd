"""Stage `measure`: one forward pass over the calibration set, sharded over Ray tasks by whole batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import ray

from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.pruning.plan import resolve_num_removed
from sdft_ray.stages.amounts import amounts, start_config
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, merge_usage, remote_options
from sdft_ray.store import files
from sdft_ray.store.manifest import Usage

Parts = dict[str, bytes]
"""What one task saw: file names of the artifact, each with moments that are merged by `+`."""


def run(job: StageContext) -> StageResult:
    """Spread batches over tasks, merge their sums by `+`, store the scores."""
    settings = job.resources.measure
    task = ray.remote(_shard).options(**remote_options(settings), max_retries=3)
    refs = [task.remote(job, index, settings.num_tasks) for index in range(settings.num_tasks)]
    return _stored(job, ray.get(refs))


def _stored(job: StageContext, shards: Sequence[tuple[Parts, Usage]]) -> StageResult:
    """What the shards saw, put together."""
    parts = [part for part, _ in shards]
    moments = reduce(add, [DepthMoments.from_json(part[files.DEPTH_SCORES].decode()) for part in parts])
    scores = replace(moments.scores(), zero_tokens=_named(job, moments.zero_tokens))
    result = StageResult(usage=merge_usage([usage for _, usage in shards]))
    result.summary = {"num_sequences": scores.num_sequences, "num_tokens": scores.num_tokens}
    if scores.zero_tokens:
        result.summary["zero_tokens"] = scores.zero_tokens
    with job.output(result) as directory:
        (directory / files.DEPTH_SCORES).write_text(scores.to_json(), encoding="utf-8")
        if job.slice.get("channels"):
            (directory / files.WIDTH_MOMENTS).write_bytes(_channels([part[files.WIDTH_MOMENTS] for part in parts]))
        if "drops" in job.slice:
            text = _losses([part[files.DROP_LOSSES].decode() for part in parts])
            (directory / files.DROP_LOSSES).write_text(text, encoding="utf-8")
    return result


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


def _losses(parts: Sequence[str]) -> str:
    """What the loss becomes without blocks, merged."""
    from sdft_ray.importance.perplexity import DropMoments

    return reduce(add, map(DropMoments.from_json, parts)).to_json()


def _shard(job: StageContext, index: int, num_shards: int) -> tuple[Parts, Usage]:
    """What every `num_shards`-th batch shows of what the recipe asks for; all shards agree on the batches."""
    from sdft_ray.importance.depth import measure
    from sdft_ray.importance.perplexity import DropMoments, drop_losses
    from sdft_ray.importance.width import watched
    from sdft_ray.models.loading import load_model

    with UsageMeter(gpus=job.resources.measure.gpus) as meter:
        job.phase("loading the model")
        tell = job.part(str(index))
        mine = calibration(job)[index::num_shards]
        model: Any = load_model(job.model("start"), job.teacher.dtype)
        model.to("cuda" if job.resources.measure.gpus else "cpu")
        num_blocks, num_removed = model.config.num_hidden_layers, _num_dropped(job)
        moments, total = DepthMoments.empty(num_blocks), len(mine) * (2 if num_removed else 1)
        with watched(model) if job.slice.get("channels") else nullcontext() as watch:
            for done, batch in enumerate(mine, 1):
                moments = measure(model, [batch[:2]], moments, watch=watch)
                tell(done, total, "batches")
        parts = {files.DEPTH_SCORES: moments.to_json().encode()}
        if watch is not None:
            parts[files.WIDTH_MOMENTS] = watch.moments.to_bytes()
        if num_removed:
            losses = DropMoments.empty(num_blocks, num_removed)
            for done, batch in enumerate(mine, 1 + len(mine)):
                losses = drop_losses(model, [batch], num_removed, losses)
                tell(done, total, "batches")
            parts[files.DROP_LOSSES] = losses.to_json().encode()
    return parts, meter.usage(moments.num_tokens)


def calibration(job: StageContext) -> list[Any]:
    """The batches of the calibration set."""
    import pyarrow.parquet as pq

    from sdft_ray.data.calibration import calibration_batches
    from sdft_ray.data.chat import load_tokenizer

    batches = calibration_batches(
        pq.read_table(job.input("calibration") / files.ROWS),
        load_tokenizer(job.model("start")),
        max_tokens=job.slice["max_tokens"],
        batch_tokens=job.resources.measure.batch_tokens,
        chat=job.teacher.chat_settings,
    )
    return list(batches)


def _num_dropped(job: StageContext) -> int:
    """Blocks whose absence is measured at once; 0 where the recipe does not choose by that."""
    if "drops" not in job.slice:
        return 0
    return resolve_num_removed(amounts(job)[0], start_config(job))
