"""Stage `evaluate`: the lm-eval harness on one model, teacher, pruned or student alike."""

from __future__ import annotations

import json
from pathlib import Path

import ray

from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, remote_options


def run(job: Job) -> Made:
    """One task per model; models are evaluated side by side as the cluster allows."""
    options = remote_options(job.resources.evaluate)
    return ray.get(ray.remote(_evaluate).options(**options, max_retries=3).remote(job))


def _evaluate(job: Job) -> Made:
    made = Made()
    with Meter(gpus=job.resources.evaluate.gpus) as meter:
        evaluate_model(job, job.model("model"), made)
    made.usage = meter.usage()
    return made


def evaluate_model(job: Job, model_dir: Path, made: Made) -> None:
    """Ask the model in `model_dir` the recipe's tasks; scores and their summary go into `made`."""
    from sdft_ray.evaluation.harness import evaluate

    asked, settings = job.recipe.evaluate, job.resources.evaluate
    with job.output(made) as directory:
        scores = evaluate(
            model_dir,
            [task.name for task in asked.tasks],
            include=Path(asked.include) if asked.include else None,
            limit=asked.limit,
            num_fewshot={task.name: task.num_fewshot for task in asked.tasks},
            metrics={task.name: task.metric for task in asked.tasks},
            batch_size=settings.batch_size,
            apply_chat_template=asked.apply_chat_template,
            seed=asked.seed,
            device="cuda" if settings.gpus else "cpu",
            dtype=job.recipe.teacher.dtype,
            on_item=lambda done, total: job.progress(done, total, "items"),
        )
        data = scores.to_json()
        (directory / files.SCORES).write_text(json.dumps(data), encoding="utf-8")
        made.summary = {
            "scores": {
                name: {"value": score.value, "stderr": score.stderr, "n": score.n, "metric": score.metric}
                for name, score in scores.tasks.items()
            },
            "num_truncated": scores.num_truncated,
        }
