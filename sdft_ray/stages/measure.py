"""Stage `measure`: one forward pass over the calibration set, sharded over Ray tasks by whole batches."""

from __future__ import annotations

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
    parts: list[tuple[str, Usage]] = ray.get(refs)
    moments = DepthMoments.from_json(parts[0][0])
    for text, _ in parts[1:]:
        moments = moments + DepthMoments.from_json(text)
    scores = moments.scores()
    made = Made(usage=together([usage for _, usage in parts]))
    made.summary = {"num_sequences": scores.num_sequences, "num_tokens": scores.num_tokens}
    with job.output(made) as directory:
        (directory / files.DEPTH_SCORES).write_text(scores.to_json(), encoding="utf-8")
    return made


def read_scores(job: Job, role: str = "measure") -> DepthScores:
    return DepthScores.from_json((job.input(role) / files.DEPTH_SCORES).read_text(encoding="utf-8"))


def _shard(job: Job, index: int, num_shards: int) -> tuple[str, Usage]:
    """The moments of every `num_shards`-th batch, as JSON; all shards agree on the batches."""
    import pyarrow.parquet as pq

    from sdft_ray.data.calibration import calibration_batches
    from sdft_ray.data.chat import load_tokenizer
    from sdft_ray.importance.depth import measure
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
        for done, batch in enumerate(mine, 1):
            moments = measure(model, [batch], moments)
            job.progress(done, len(mine), "batches")
    return moments.to_json(), meter.usage(moments.num_tokens)
