"""What would make a step smaller that does not fit its machine: each change in words, with the need that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdft_ray.pipeline.needs import SHORTEST_CONTEXT, Situation, training_of
from sdft_ray.planning.engines import least_cache_tokens
from sdft_ray.planning.need import Need
from sdft_ray.planning.training import worker_need
from sdft_ray.recipe.arms import Lora
from sdft_ray.recipe.resources import Resources, Train
from sdft_ray.stages.graph import Step
from sdft_ray.stages.spec import workers_of

Change = tuple[str, Callable[[], Need]]


def changes(situation: Situation, resources: Resources, step: Step) -> list[Change]:
    """What can be changed for `step`, from small to large, one after the other; changes of training add up."""
    if step.stage in ("train", "correct"):
        return _of_training(situation, resources, step)
    if step.stage in ("generate", "evaluate", "why"):
        return _of_engine(situation, resources, step)
    if step.stage in ("measure", "patch", "gap", "forget", "likeness"):
        part = workers_of(step.stage, resources)
        assert part is not None
        name = "measure" if step.stage in ("measure", "patch") else "gap"
        less = {"batch_tokens": 512} | ({"num_tasks": 1} if name == "measure" else {})
        smaller = resources.model_copy(update={name: part.model_copy(update=less)})
        words = f"set {name}.batch_tokens: 512 in the resources file"
        return [(words, lambda: situation.need(step, smaller)), *_in_bfloat16(situation, resources, step)]
    return _in_bfloat16(situation, resources, step)


def _in_bfloat16(situation: Situation, resources: Resources, step: Step) -> list[Change]:
    if situation.recipe.teacher.dtype != "float32":
        return []
    teacher = situation.recipe.teacher.model_copy(update={"dtype": "bfloat16"})
    smaller = situation.with_recipe(situation.recipe.model_copy(update={"teacher": teacher}))
    return [("set teacher.dtype: bfloat16 in the recipe", lambda: smaller.need(step, resources))]


def _of_training(situation: Situation, resources: Resources, step: Step) -> list[Change]:
    """Rows at a time, checkpointing, shorter rows, sharding over GPUs, adapters."""
    settings, work = resources.train, training_of(situation, step)

    def needs(**fewer: Any) -> Callable[[], Need]:
        tried: Train = settings.model_copy(update=fewer)
        return lambda: worker_need(work, tried, num_workers=tried.min_workers, micro_batch_rows=tried.micro_batch_rows)

    found: list[Change] = []
    fewest: dict[str, Any] = {"micro_batch_size": 1, **({} if settings.gpus else {"num_workers": 1})}
    if settings.micro_batch_rows > 1 or settings.min_workers > 1:
        found.append(("leave train.num_workers and train.micro_batch_size out of the resources file", needs(**fewest)))
    if not settings.activation_checkpointing:
        fewest["activation_checkpointing"] = True
        found.append(("set train.activation_checkpointing: true in the resources file", needs(**fewest)))
    if settings.gpus and settings.min_workers > 1 and settings.strategy == "ddp":
        found.append(("set train.strategy: fsdp in the resources file", needs(**fewest, strategy="fsdp")))
    shorter = situation.with_row_tokens(max(256, work.row_tokens // 2))
    tried = settings.model_copy(update=fewest)
    if shorter.recipe.train.max_seq_len < work.row_tokens:
        words = f"set train.max_seq_len: {shorter.recipe.train.max_seq_len} in the recipe"
        if not settings.activation_checkpointing:
            words += " and train.activation_checkpointing: true in the resources file"
        found.append((words, lambda: shorter.train_need(step, tried)))
    if work.lora is None:
        adapted = situation.with_lora(Lora())
        found.append(("train adapters (train.lora: {} in the recipe)", lambda: adapted.train_need(step, tried)))
    return found


def _of_engine(situation: Situation, resources: Resources, step: Step) -> list[Change]:
    part = "generate" if step.stage == "generate" else "evaluate"
    settings: Any = getattr(resources, part)
    found: list[Change] = []
    context = settings.context_tokens or situation.most_tokens
    while context > SHORTEST_CONTEXT:
        context = max(SHORTEST_CONTEXT, context // 2)
        room = least_cache_tokens(context) * situation.token_kv_bytes(settings)
        changed = settings.model_copy(update={"max_model_tokens": context, "kv_cache_bytes": room})
        smaller = resources.model_copy(update={part: changed})
        words = f"set {part}.max_model_tokens: {context} in the resources file"
        found.append((words, lambda smaller=smaller: situation.need(step, smaller)))
    return [*found, *_in_bfloat16(situation, resources, step)]
