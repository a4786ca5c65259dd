"""Evaluation in this process: the harness over a sampler that is started when the first question comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from sdft_ray.evaluation.harness import EvalConfig, Result
from sdft_ray.evaluation.harness import evaluate as ask_tasks
from sdft_ray.evaluation.progress import OnItem
from sdft_ray.evaluation.questions import Answer, Question
from sdft_ray.recipe.resources import Engine
from sdft_ray.stages.evaluators import answers
from sdft_ray.stages.samplers import local_sampler
from sdft_ray.statistics.scores import Scores


def evaluate(checkpoint: Path, tasks: Sequence[str], **asked: Any) -> Scores:
    """Scores by the transformers sampler, in the checkpoint's own dtype."""
    return result_of(checkpoint, tasks, **asked).scores


def result_of(
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    on_item: OnItem | None = None,
    kind: str = "transformers",
    dtype: str = "auto",
    max_length: int | None = None,
    **asked: Any,
) -> Result:
    """Scores and items; `asked` is as in `EvalConfig`."""
    with ExitStack() as stack:
        held: list[Any] = []

        def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
            if not held:
                sampler = local_sampler(checkpoint, kind, Engine(), dtype)
                held.append(stack.enter_context(closing(sampler)))
            return answers(held[0], questions)

        return ask_tasks(checkpoint, EvalConfig(tasks, **asked), ask, on_item, max_length=max_length)
