"""Stage `evaluate`: the lm-eval harness on one model, teacher, pruned or student alike.

One light actor holds the harness. What it wants to know of the model it asks engines, and all of them go from one model
to the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.recipe.scoring import Evaluate
from sdft_ray.stages.evaluators import EngineClient, acquire
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter
from sdft_ray.stages.views import view
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.evaluation.harness import EvalConfig
    from sdft_ray.evaluation.questions import Ask

_ANSWERS = "answers.jsonl"


def run(job: StageContext) -> StageResult:
    """Models are evaluated side by side as the cluster allows."""
    with acquire(job.resources.evaluate, Harness) as crew:
        return ray.get(crew.harness.run.remote(job, crew.engines))


class Harness:
    """Tasks, prompts, filters and metrics of one evaluation after another, in a process that has lm-eval loaded."""

    def run(self, job: StageContext, engines: list[Any]) -> StageResult:
        """Evaluate the model of a job by engines that answer."""
        output = StageResult()
        with UsageMeter(gpus=job.resources.evaluate.gpus * len(engines)) as meter:
            pool = EngineClient(job, engines, job.work() / _ANSWERS)
            evaluate_model(job, job.model("model"), pool, output)
        usage = meter.usage()
        output.usage = replace(usage, peak_rss_bytes=usage.peak_rss_bytes + pool.peak_rss_bytes * len(engines))
        output.summary |= {"num_reused": pool.num_reused, "engines": pool.engines}
        return output


def evaluate_model(job: StageContext, model_dir: Path, ask: Ask, output: StageResult) -> None:
    """Ask the recipe's tasks of the model that answers; scores, items and their summary go into `output`."""
    from sdft_ray.evaluation.harness import evaluate
    from sdft_ray.evaluation.items import ITEMS

    job.phase("loading the tasks")
    with job.output(output) as directory:
        on_items: Callable[[int, int], None] = lambda done, total: job.progress(done, total, "items")  # noqa: E731
        result = evaluate(model_dir, eval_config(job), ask, on_items, max_length=job.resources.evaluate.context_tokens)
        scores = result.scores
        (directory / files.SCORES).write_text(json.dumps(scores.to_json()), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(result.items, schema=ITEMS), directory / files.ITEMS, compression="zstd")
        output.summary = {
            "scores": {
                name: {"value": score.value, "stderr": score.stderr, "n": score.n, "metric": score.metric}
                | ({"not_averaged": score.not_averaged} if score.not_averaged else {})
                for name, score in scores.tasks.items()
            },
            "num_truncated": scores.num_truncated,
        }


def eval_config(job: StageContext) -> EvalConfig:
    """The slice of a step of `evaluate` or `why`, in the harness's words."""
    from sdft_ray.evaluation.harness import EvalConfig
    from sdft_ray.evaluation.pass_at_k import Samples

    asked = view(Evaluate, job.slice.get("evaluate", job.slice), absent=("tuned", "include", "data"))
    return EvalConfig(
        tasks=[task.name for task in asked.tasks],
        include=job.places.tasks.include,
        data=job.places.tasks.data,
        working_dir=job.places.tasks.working_dir,
        limit=asked.limit,
        num_fewshot=asked.shots,
        metrics={task.name: task.metric for task in asked.tasks},
        apply_chat_template=asked.apply_chat_template,
        seed=asked.seed,
        samples=Samples(**asked.samples.model_dump()) if asked.samples else None,
        chat=job.teacher.chat_settings,
    )
