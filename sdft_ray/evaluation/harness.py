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
from lm_eval.api.task import Task

from sdft_ray.data.messages import ChatSettings
from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.items import item_rows, outputs_of, written_of
from sdft_ray.evaluation.lm import BatchedLM
from sdft_ray.evaluation.pass_at_k import Samples, pass_at_k
from sdft_ray.evaluation.progress import ItemCounter, OnItem, quiet
from sdft_ray.evaluation.questions import Ask
from sdft_ray.evaluation.tasks import leaf_tasks, load_tasks
from sdft_ray.evaluation.templates import compile_templates
from sdft_ray.statistics.scores import Scores, TaskScore

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
"""The primary metric of a task is the first of these that it reports, else the first that it reports at all.

Its first filter is taken. This gives the metrics of the Open LLM Leaderboard v1: `acc_norm` for ARC and
HellaSwag, `acc` for MMLU, TruthfulQA (mc2) and WinoGrande, strict `exact_match` for GSM8K.
"""

_BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class EvalConfig:
    """The configuration of an evaluation: lm-eval tasks, tags or groups, and how they are run.

    `include` is a folder of task files whose `data_files` are relative to the file that names them. `limit`
    takes the first items of each task. `num_fewshot` is one number, or one per task; None is the task's own,
    and a task that fixes 0 keeps it, as in lm-eval. `metrics` names the primary metric of a task ("acc", or
    "exact_match,strict-match" with its filter); for the rule without it see `PREFERRED_METRICS`. `seed` draws
    few-shot examples and samples. `num_outputs` responses per generation task are stored for inspection. With
    `samples`, several answers to each item of generation tasks are sampled as well. `chat` goes to the chat template.
    """

    tasks: Sequence[str]
    include: str | Path | None = None
    limit: int | None = None
    num_fewshot: int | Mapping[str, int | None] | None = None
    metrics: Mapping[str, str | None] | None = None
    apply_chat_template: bool = True
    seed: int = 0
    num_outputs: int = 4
    samples: Samples | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)


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
    if config.limit is not None and config.limit < 1:
        raise EvaluationError(f"limit is {config.limit}", "make it 1 or more, or leave it out")
    metrics = config.metrics or {}
    with quiet() as terminal:
        by_name = load_tasks(config.tasks, config.include)
        for name, parts in by_name.items():
            fewshot = config.num_fewshot
            _set_fewshot(leaf_tasks(parts), fewshot.get(name) if isinstance(fewshot, Mapping) else fewshot)
            _check_metric(name, leaf_tasks(parts), metrics.get(name))
        loaded = [part for parts in by_name.values() for part in parts]
        for task in leaf_tasks(loaded):
            compile_templates(task)
        total = sum(min(len(task.eval_docs), config.limit or sys.maxsize) for task in leaf_tasks(loaded))
        lm = create(ItemCounter(total, on_item, terminal))
        chat = config.apply_chat_template
        results = _run(lm, loaded, limit=config.limit, apply_chat_template=chat, seed=config.seed)
        scored = [
            _score(part, results, metrics.get(name), config, lm)
            for name, parts in by_name.items()
            for part in _scored(parts)
        ]
    tasks = {score.task: score for score, _ in scored}
    truncated = sum(score.num_truncated for score in tasks.values())
    return Result(Scores(tasks, truncated, version("lm_eval")), [row for _, rows in scored for row in rows])


def _run(lm: Any, loaded: list[Task | Group], *, limit: int | None, apply_chat_template: bool, seed: int) -> Any:
    """The inner half of `simple_evaluate`, whose outer half also queries git, pip and the hub, and prints.

    Seeds and few-shot examples are set here as its outer half sets them.
    """
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
        limit=limit,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
        apply_chat_template=apply_chat_template,
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


def _check_metric(name: str, leaves: Sequence[Task], metric: str | None) -> None:
    """Raise `EvaluationError` for an unknown metric before the evaluation runs."""
    known = sorted({metric for task in leaves for metric in (task.aggregation() or ())})
    if metric is not None and known and metric.partition(",")[0] not in known:
        raise EvaluationError(f"task {name!r} has no metric {metric!r}", f"it has {', '.join(known)}")


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
    score = TaskScore(
        task=name,
        metric=metric,
        filter=filtered_by,
        value=float(metrics[key]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        n=sum(len(part) for part in samples.values()),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        higher_is_better=higher is not False,
        chance=_chance(leaves, samples),
        items={row["item"]: row["value"] for row in rows},
        outputs=outputs_of(leaves, samples, metric, config.num_outputs),
        num_truncated=sum(lm.num_truncated[task.task_name] for task in leaves),
        written=stats,
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
