"""lm-eval's own scores of a local checkpoint: its `evaluate` with its `hf` model, quiet and strict."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from sdft_ray.data.chat import load_tokenizer
from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation.scores import Output, Scores, TaskScore
from sdft_ray.evaluation.tasks import leaf_tasks, load_tasks
from sdft_ray.models.loading import load_model

OnItem = Callable[[int, int], None]
"""Called with (items done, items in all) while a model is evaluated."""

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
"""The primary metric of a task is the first of these that it reports, else the first that it reports at all.

Its first filter is taken. This gives the metrics of the Open LLM Leaderboard v1: `acc_norm` for ARC and
HellaSwag, `acc` for MMLU, TruthfulQA (mc2) and WinoGrande, strict `exact_match` for GSM8K.
"""

_BOOTSTRAP_DRAWS = 1000


def evaluate(
    model_dir: str | Path,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | Mapping[str, int | None] | None = None,
    metrics: Mapping[str, str | None] | None = None,
    batch_size: int = 64,
    apply_chat_template: bool = True,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "auto",
    num_outputs: int = 4,
    on_item: OnItem | None = None,
) -> Scores:
    """Score the checkpoint in `model_dir` on lm-eval tasks, tags or groups.

    `include` is a folder of task files whose `data_files` are relative to the file that names them. `limit`
    takes the first items of each task. `num_fewshot` is one number, or one per task; None is the task's own,
    and a task that fixes 0 keeps it, as in lm-eval. `metrics` names the primary metric of a task ("acc", or
    "exact_match,strict-match" with its filter); for the rule without it see `PREFERRED_METRICS`. `seed` draws
    few-shot examples. `num_outputs` responses per generation task are kept to look at. Reaching the hub is
    the caller's affair: HF_HUB_OFFLINE and HF_DATASETS_OFFLINE in the environment are obeyed.

    Raises `EvaluationError` for tasks, metrics or data that cannot be had, before the model is loaded where
    that can be known, and `ModelError` for a checkpoint that cannot be loaded.
    """

    def checkpoint(counter: ItemCounter) -> CheckpointLM:
        lm = CheckpointLM(model_dir, dtype=dtype, device=device, batch_size=batch_size, counter=counter)
        if apply_chat_template:
            lm.check_chat_prompt()
        return lm

    asked = Asked(tasks, include, limit, num_fewshot, metrics, apply_chat_template, seed, num_outputs)
    return evaluate_with(checkpoint, asked, on_item)


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, as `evaluate` says it."""

    tasks: Sequence[str]
    include: str | Path | None = None
    limit: int | None = None
    num_fewshot: int | Mapping[str, int | None] | None = None
    metrics: Mapping[str, str | None] | None = None
    apply_chat_template: bool = True
    seed: int = 0
    num_outputs: int = 4


def evaluate_with(make: Callable[[ItemCounter], Any], asked: Asked, on_item: OnItem | None = None) -> Scores:
    """Score any model of lm-eval's, made when the tasks are known to be there. Raises as `evaluate`."""
    if asked.limit is not None and asked.limit < 1:
        raise EvaluationError(f"limit is {asked.limit}", "make it 1 or more, or leave it out")
    metrics = asked.metrics or {}
    with _quiet() as terminal:
        by_name = load_tasks(asked.tasks, asked.include)
        for name, parts in by_name.items():
            fewshot = asked.num_fewshot
            _set_fewshot(leaf_tasks(parts), fewshot.get(name) if isinstance(fewshot, Mapping) else fewshot)
            _check_metric(name, leaf_tasks(parts), metrics.get(name))
        loaded = [part for parts in by_name.values() for part in parts]
        total = sum(min(len(task.eval_docs), asked.limit or sys.maxsize) for task in leaf_tasks(loaded))
        lm = make(ItemCounter(total, on_item, terminal))
        chat = asked.apply_chat_template
        results = _run(lm, loaded, limit=asked.limit, apply_chat_template=chat, seed=asked.seed)
    scores = [
        _score(part, results, metrics.get(name), asked.num_outputs)
        for name, parts in by_name.items()
        for part in _scored(parts)
    ]
    return Scores({score.task: score for score in scores}, lm.num_truncated)


def _run(lm: Any, loaded: list[Task | Group], *, limit: int | None, apply_chat_template: bool, seed: int) -> Any:
    """The inner half of `simple_evaluate`, which also asks git, pip and the hub what they know, loudly.

    What the outer half does before it, with seeds and few-shot examples, is done here in the same way.
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


_HFLM: Any = HFLM  # lm-eval's registration hides the class from type checkers


class CheckpointLM(_HFLM):
    """lm-eval's `hf` model over a checkpoint loaded here: safetensors only, local files only, no bars."""

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        device: str,
        batch_size: int,
        counter: ItemCounter | None = None,
    ) -> None:
        """Load model and tokenizer onto `device`. Raises `ModelError`."""
        model: Any = load_model(Path(model_dir), dtype)
        super().__init__(pretrained=model.to(device), tokenizer=load_tokenizer(Path(model_dir)), batch_size=batch_size)
        self.num_truncated = 0
        self._counter = counter
        if counter is not None:
            self.set_cache_hook(counter)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in lm-eval."""
        self._begin(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As in lm-eval."""
        self._begin(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As in lm-eval."""
        self._begin(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        room = self.max_length + 1  # the last token is only predicted
        self.num_truncated += sum(len(context) + len(option) > room for _, context, option in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in lm-eval; counts what it cuts."""
        if left_truncate_len is not None:
            self.num_truncated += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, **kwargs)

    def check_chat_prompt(self) -> None:
        """Raises `ModelError` without a chat template, and when a prompt would start with two BOS tokens."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", "add one, or evaluate with apply_chat_template: false"
            )
        prompt = self.apply_chat_template([{"role": "user", "content": "Hello"}])
        begin = self.tokenizer.bos_token_id
        batched, _ = self.tok_batch_encode([prompt])
        for ids in (self.tok_encode(prompt), batched[0].tolist()):
            if begin is not None and ids[:2] == [begin, begin]:
                raise ModelError(
                    "chat prompts start with two BOS tokens in lm-eval",
                    "let either the chat template or the tokenizer add it",
                )

    def _begin(self, requests: list[Instance]) -> None:
        if self._counter is not None:
            self._counter.begin(requests)


class ItemCounter(CacheHook):
    """Counts finished requests: lm-eval tells its response cache about every one.

    Options of one item are separate requests, in an order of their own, so items are counted in proportion.
    """

    def __init__(self, total: int, on_item: OnItem | None, terminal: Any) -> None:
        super().__init__(None)
        self._total, self._on_item, self._terminal = total, on_item, terminal
        self._before = self._requests = self._items = self._done = self._told = 0

    def begin(self, requests: list[Instance]) -> None:
        """The requests of one kind are about to run."""
        self._before += self._items
        self._requests, self._done = len(requests), 0
        self._items = len({(request.task_name, request.doc_id) for request in requests})

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One request is finished."""
        self._done += 1
        done = min(self._total, self._before + self._items * self._done // max(1, self._requests))
        if self._on_item is not None and done > self._told:
            self._told = done
            with contextlib.redirect_stderr(self._terminal):
                self._on_item(done, self._total)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Silence lm-eval, datasets and transformers for a block; yields the stderr that was there before.

    Their progress bars write to `sys.stderr` and some cannot be turned off, so it is exchanged; log levels
    are put back.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    terminal = sys.stderr
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield terminal
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- from lm-eval's results to scores -----------------------------------------------------------------------


def _scored(loaded: Sequence[Task | Group]) -> list[Task | Group]:
    """What gets a score of its own: tasks, groups that aggregate, and the tasks of groups that do not."""
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


def _check_metric(name: str, leaves: Sequence[Task], wanted: str | None) -> None:
    """A misspelt metric should not cost an evaluation first. Raises `EvaluationError`."""
    known = sorted({metric for task in leaves for metric in (task.aggregation() or ())})
    if wanted is not None and known and wanted.partition(",")[0] not in known:
        raise EvaluationError(f"task {name!r} has no metric {wanted!r}", f"it has {', '.join(known)}")


def _score(part: Task | Group, results: Any, wanted: str | None, num_outputs: int) -> TaskScore:
    name = _name(part)
    found: dict[str, Any] = results["results"][name]
    key = _primary(name, [key for key in found if "," in key and "_stderr," not in key], wanted)
    metric, _, filtered_by = key.rpartition(",")
    stderr = found.get(f"{metric}_stderr,{filtered_by}")
    leaves = leaf_tasks([part])
    samples = {task.task_name: _of_filter(results["samples"][task.task_name], filtered_by) for task in leaves}
    prefixed = isinstance(part, Group)
    items = {
        f"{task}/{sample['doc_id']}" if prefixed else str(sample["doc_id"]): float(sample[metric])
        for task, rows in samples.items()
        for sample in rows
        if isinstance(sample.get(metric), (bool, int, float))
    }
    higher = results["higher_is_better"].get(name, {}).get(metric)
    return TaskScore(
        task=name,
        metric=metric,
        filter=filtered_by,
        value=float(found[key]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        n=sum(len(rows) for rows in samples.values()),
        num_fewshot=results["n-shot"].get(name),
        higher_is_better=higher is not False,
        chance=_chance(leaves, samples),
        items=items,
        outputs=_outputs(leaves, samples, metric, num_outputs),
    )


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
    """Expected accuracy of guessing; None for tasks with a scoring of their own."""
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


def _outputs(
    leaves: list[Task], samples: Mapping[str, list[dict[str, Any]]], metric: str, num_outputs: int
) -> tuple[Output, ...]:
    rows = [
        (task, row)
        for task in leaves
        if task.OUTPUT_TYPE == "generate_until"
        for row in samples[task.task_name]
        if isinstance(row.get(metric), (bool, int, float))
    ]
    return tuple(
        Output(
            item=str(row["doc_id"]),
            prompt=str(row["arguments"][0][0]),
            response=str(row["resps"][0][0]),
            filtered=str(row["filtered_resps"][0]),
            target=str(row["target"]),
            value=float(row[metric]),
        )
        for _, row in rows[:num_outputs]
    )
