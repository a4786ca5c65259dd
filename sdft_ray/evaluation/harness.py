"""lm-eval's own scores of a model: its `evaluate`, tasks, filters and metrics, without output to the terminal."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.registry import get_aggregation
from lm_eval.api.task import Task

from sdft_ray.data.messages import ChatSettings
from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.items import item_rows, outputs_of, written_of
from sdft_ray.evaluation.lm import BatchedLM
from sdft_ray.evaluation.pass_at_k import Samples, pass_at_k
from sdft_ray.evaluation.progress import ItemCounter, OnItem, one_process, quiet
from sdft_ray.evaluation.questions import Ask
from sdft_ray.evaluation.task_modules import importable
from sdft_ray.evaluation.task_plans import TaskPlaces, tasks_of
from sdft_ray.evaluation.tasks import check_metric, leaf_tasks, load_tasks
from sdft_ray.evaluation.templates import compile_templates
from sdft_ray.statistics.scores import Scores, TaskScore, is_share

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
"""The primary metric of a task is the first of these that it reports, else the first that it reports at all.

Its first filter is taken. This gives the metrics of the Open LLM Leaderboard v1: `acc_norm` for ARC and
HellaSwag, `acc` for MMLU, TruthfulQA (mc2) and WinoGrande, strict `exact_match` for GSM8K.
"""

_SCALES = {"bleu": 100.0, "chrf": 100.0, "chrf++": 100.0, "ter": 100.0}
"""lm-eval's aggregations that give 0 to 100 (sacrebleu). Custom ones of that kind are not known by their name."""

_BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class EvalConfig:
    """The configuration of an evaluation: lm-eval tasks, tags or groups, and how they are run.

    `include` is a folder of task files whose `data_files` are relative to the file that names them, else to
    `working_dir`. `data` is a folder with the data sets of the hub (`task_data`). `limit` takes the first items of each
    task, and of each member of a group; it is one number, or one for each of some tasks. `num_fewshot` is one number,
    or one per task; None is the task's own, and a task that fixes 0 keeps it, as in lm-eval. `metrics` names a task's
    primary metric ("acc", or "exact_match,strict-match" with its filter); for the rule without it see
    `PREFERRED_METRICS`. `seed` draws few-shot examples and samples. `num_outputs` responses per generation task are
    stored for inspection. With `samples`, several answers to each item of generation tasks are sampled as well. `chat`
    goes to the chat template.
    """

    tasks: Sequence[str]
    include: str | Path | None = None
    limit: int | Mapping[str, int] | None = None
    num_fewshot: int | Mapping[str, int | None] | None = None
    metrics: Mapping[str, str | None] | None = None
    apply_chat_template: bool = True
    seed: int = 0
    num_outputs: int = 4
    samples: Samples | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)
    data: str | Path | None = None
    working_dir: Path | None = None

    @property
    def places(self) -> TaskPlaces:
        """Where the tasks and their data lie."""
        include, data = (None if place is None else Path(place) for place in (self.include, self.data))
        return TaskPlaces(include, data, self.working_dir)

    @property
    def shots(self) -> Mapping[str, int | None]:
        """Number of few-shot examples by task; None: the task's own."""
        asked = self.num_fewshot
        return asked if isinstance(asked, Mapping) else dict.fromkeys(self.tasks, asked)

    def limit_of(self, name: str) -> int | None:
        """Items of each task behind a name; None: all."""
        return self.limit.get(name) if isinstance(self.limit, Mapping) else self.limit


@dataclass(frozen=True)
class Result:
    """Scores, and the rows of `items.ITEMS` behind them."""

    scores: Scores
    items: list[dict[str, Any]]


def evaluate(
    model_dir: str | Path,
    config: EvalConfig,
    ask: Ask,
    on_item: OnItem | None = None,
    *,
    max_length: int | None = None,
) -> Result:
    """Score the model behind `ask`. The checkpoint in `model_dir` defines the tokenizer and the context length, which
    `max_length` can shorten.

    Hub access is up to the caller: HF_HUB_OFFLINE and HF_DATASETS_OFFLINE in the environment are respected. Raises
    `EvaluationError` for unknown or unavailable tasks, metrics or data, before the first request where possible, and
    `ModelError` for an unusable tokenizer.
    """

    def create(counter: ItemCounter) -> BatchedLM:
        lm = BatchedLM(model_dir, ask, counter, max_length=max_length, chat=config.chat)
        if config.apply_chat_template:
            lm.check_chat_prompt()
        return lm

    return evaluate_with(create, config, on_item)


def evaluate_with(create: Callable[[ItemCounter], Any], config: EvalConfig, on_item: OnItem | None = None) -> Result:
    """Score any lm-eval model, created by `create` once the tasks are loaded. Raises as `evaluate` does.

    Models without details on generated texts have an empty `texts`.
    """
    limits = config.limit.values() if isinstance(config.limit, Mapping) else [config.limit]
    if (low := min((limit for limit in limits if limit is not None), default=1)) < 1:
        raise EvaluationError(f"limit is {low}", "make it 1 or more, or leave it out")
    metrics = config.metrics or {}
    plans = config.places.library().plans(config.tasks)
    leaves = [task for parts in plans.values() for task in tasks_of(parts)]
    with quiet() as terminal, one_process(), importable(leaves, config.places.origin):
        by_name = load_tasks(config.tasks, config.places, config.shots, plans)
        for name, parts in by_name.items():
            _set_fewshot(leaf_tasks(parts), config.shots.get(name))
            check_metric(name, leaf_tasks(parts), metrics.get(name))
        loaded = [part for parts in by_name.values() for part in parts]
        for task in leaf_tasks(loaded):
            compile_templates(task)
        counts = {
            task.task_name: min(len(task.eval_docs), config.limit_of(name) or sys.maxsize)
            for name, parts in by_name.items()
            for task in leaf_tasks(parts)
        }
        lm = create(ItemCounter(sum(counts.values()), on_item, terminal))
        results = _run(lm, loaded, config, counts)
        scored = [
            _score(part, results, metrics.get(name), config, lm)
            for name, parts in by_name.items()
            for part in _scored(parts)
        ]
    tasks = {score.task: score for score, _ in scored}
    truncated = sum(score.num_truncated for score in tasks.values())
    return Result(Scores(tasks, truncated, version("lm_eval")), [row for _, rows in scored for row in rows])


def _run(lm: Any, loaded: list[Task | Group], config: EvalConfig, counts: Mapping[str, int]) -> Any:
    """The inner half of `simple_evaluate`, whose outer half also queries git, pip and the hub, and prints.

    Seeds and few-shot examples are set here as its outer half sets them. `counts` are the items of each task.
    """
    seed, limit = config.seed, config.limit
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    leaves = leaf_tasks(loaded)
    for task in leaves:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    groups = [group for part in loaded if isinstance(part, Group) for group in [part, *part.get_all_groups()]]
    run: Any = lm_eval.evaluate  # annotated for positional use only
    return run(
        lm=lm,
        task_dict={
            "tasks": {task.task_name: task for task in leaves},
            "groups": {group.name: group for group in groups},
        },
        limit=None if isinstance(limit, Mapping) else limit,
        samples={name: list(range(num)) for name, num in counts.items()} if isinstance(limit, Mapping) else None,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=True,
    )


# --- from lm-eval's results to scores -----------------------------------------------------------------------


def _scored(loaded: Sequence[Task | Group]) -> list[Task | Group]:
    """Everything with its own score: tasks, groups that aggregate, and the tasks of groups that do not."""
    return [
        scored
        for part in loaded
        for scored in (part.get_all_tasks() if isinstance(part, Group) and not part.has_aggregation else [part])
    ]


def _name(part: Task | Group) -> str:
    return part.name if isinstance(part, Group) else part.task_name


def _set_fewshot(leaves: Sequence[Task], num_fewshot: int | None) -> None:
    for task in leaves:
        # As simple_evaluate does with its one number for all: a task file that says 0 means it.
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)


def _score(
    part: Task | Group, results: Any, metric_name: str | None, config: EvalConfig, lm: Any
) -> tuple[TaskScore, list[dict[str, Any]]]:
    """The score of a task or group, and a row for each of its items."""
    name = _name(part)
    metrics: dict[str, Any] = results["results"][name]
    key = _primary(name, [key for key in metrics if "," in key and "_stderr," not in key], metric_name)
    metric, _, filtered_by = key.rpartition(",")
    stderr = metrics.get(f"{metric}_stderr,{filtered_by}")
    leaves = leaf_tasks([part])
    samples = {task.task_name: _of_filter(results["samples"][task.task_name], filtered_by) for task in leaves}
    rows = [
        {**row, "task": name, "item": f"{task.task_name}/{row['item']}" if isinstance(part, Group) else row["item"]}
        for task in leaves
        for row in item_rows(task, samples[task.task_name], metric, lm.texts)
    ]
    higher = results["higher_is_better"].get(name, {}).get(metric)
    shots = {results["n-shot"].get(task.task_name) for task in leaves}
    stats = written_of(rows)
    if stats is not None and config.samples is not None:
        chances = pass_at_k(lm, leaves, metric, filtered_by, config.samples, config.seed)
        stats = replace(stats, pass_at_k=chances)
    scale = _scale(leaves, metric, [float(metrics[key]), *(row["value"] for row in rows)])
    score = TaskScore(
        task=name,
        metric=metric,
        filter=filtered_by,
        value=float(metrics[key]) / (scale or 1),
        stderr=float(stderr) / (scale or 1) if isinstance(stderr, (int, float)) else None,
        n=sum(len(part) for part in samples.values()),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        higher_is_better=higher is not False,
        chance=_chance(leaves, samples),
        items={row["item"]: row["value"] for row in rows},
        outputs=outputs_of(leaves, samples, metric, config.num_outputs),
        num_truncated=sum(lm.num_truncated[task.task_name] for task in leaves),
        written=stats,
        scale=scale,
    )
    return score, rows


def _primary(task: str, keys: list[str], wanted: str | None) -> str:
    """The `metric,filter` key to report. Raises `EvaluationError` for a metric it does not have."""
    if wanted is not None:
        chosen = [key for key in keys if wanted in (key, key.rpartition(",")[0])]
        if not chosen:
            raise EvaluationError(f"task {task!r} has no metric {wanted!r}", f"it has {', '.join(keys)}")
        return chosen[0]
    for metric in PREFERRED_METRICS:
        for key in keys:
            if key.rpartition(",")[0] == metric:
                return key
    return keys[0]


def _of_filter(samples: list[dict[str, Any]], filtered_by: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["filter"] == filtered_by]


def _scale(leaves: Sequence[Task], metric: str, values: Sequence[float]) -> float | None:
    """What a perfect answer scores: by the way in which lm-eval aggregates the metric, else 1 if all values allow it.

    None where it is not known, or not the same for all tasks of a group.
    """
    aggregations = [aggregation.get(metric) for task in leaves if (aggregation := task.aggregation())]
    scales = {next((top for name, top in _SCALES.items() if get_aggregation(name) is how), 1.0) for how in aggregations}
    if len(scales) > 1:
        return None
    scale = scales.pop() if scales else 1.0
    return scale if scale != 1.0 or is_share(values) else None


def _chance(leaves: list[Task], samples: Mapping[str, list[dict[str, Any]]]) -> float | None:
    """Expected accuracy of random guessing; None for tasks with custom scoring."""
    levels: list[float] = []
    for task in leaves:
        rows = samples[task.task_name]
        if task.OUTPUT_TYPE == "generate_until":
            levels += [0.0] * len(rows)
        elif task.OUTPUT_TYPE == "multiple_choice" and not callable(task.get_config("process_results")):
            doubled = 2 if "acc_mutual_info" in rows[0]["metrics"] else 1
            levels += [doubled / len(row["arguments"]) for row in rows]
        else:
            return None
    return sum(levels) / len(levels)
