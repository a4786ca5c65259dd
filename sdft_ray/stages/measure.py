"""Stage `measure`: one forward pass over the calibration set, sharded over Ray tasks by whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any

import ray

from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, remote_options, together
from sdft_ray.store.manifest import Usage


def run(job: Job) -> Made:
    """Spread batches over tasks, merge their sums by `+`, store the scores."""
    settings = job.resources.measure
    task = ray.remote(_shard).options(**remote_options(settings), max_retries=3)
    refs = [task.remote(job, index, settings.num_tasks) for index in range(settings.num_tasks)]
    return _stored(job, ray.get(refs))


def _stored(job: Job, parts: Sequence[tuple[str, bytes, Usage]]) -> Made:
    """What the shards saw, put together."""
    scores = reduce(add, [DepthMoments.from_json(text) for text, _, _ in parts]).scores()
    made = Made(usage=together([usage for _, _, usage in parts]))
    made.summary = {"num_sequences": scores.num_sequences, "num_tokens": scores.num_tokens}
    with job.output(made) as directory:
        (directory / files.DEPTH_SCORES).write_text(scores.to_json(), encoding="utf-8")
        if job.recipe.width is not None:
            (directory / files.WIDTH_MOMENTS).write_bytes(_merged([content for _, content, _ in parts]))
    return made


def read_scores(job: Job, role: str = "measure") -> DepthScores:
    return DepthScores.from_json((job.input(role) / files.DEPTH_SCORES).read_text(encoding="utf-8"))


def _merged(parts: Sequence[bytes]) -> bytes:
    """Of the activity of channels."""
    from sdft_ray.importance.width import WidthMoments

    return reduce(add, map(WidthMoments.from_bytes, parts)).to_bytes()


def _shard(job: Job, index: int, num_shards: int) -> tuple[str, bytes, Usage]:
    """The moments of every `num_shards`-th batch, and of channels if asked for; all shards agree on the batches."""
    import pyarrow.parquet as pq

    from sdft_ray.data.calibration import calibration_batches
    from sdft_ray.data.chat import load_tokenizer
    from sdft_ray.importance.depth import measure
    from sdft_ray.importance.width import watched
    from sdft_ray.models.loading import load_model

    with Meter(gpus=job.resources.measure.gpus) as meter:
        teacher = job.model("teacher")
        table = pq.read_table(job.input("calibration") / files.ROWS)
        batches = calibration_batches(
            table,
            load_tokenizer(teacher),
            max_tokens=job.recipe.calibration.max_tokens,
            batch_tokens=job.resources.measure.batch_tokens,
        )
        mine = list(batches)[index::num_shards]
        device = "cuda" if job.resources.measure.gpus else "cpu"
        model: Any = load_model(teacher, job.recipe.teacher.dtype)
        model.to(device)
        moments = DepthMoments.empty(model.config.num_hidden_layers)
        with watched(model) if job.recipe.width is not None else nullcontext() as watch:
            for done, batch in enumerate(mine, 1):
                moments = measure(model, [batch], moments, watch=watch)
                job.progress(done, len(mine), "batches")
    channels = b"" if watch is None else watch.moments.to_bytes()
    return moments.to_json(), channels, meter.usage(moments.num_tokens)
