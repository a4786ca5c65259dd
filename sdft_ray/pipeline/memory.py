"""Whether a run fits its machine: what each step needs, what is chosen where the resources say `auto`, and a refusal.

Called once per run, before any worker starts: `plan_memory` gives resources without `auto`. Results do not depend on
what is chosen, beyond rounding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from sdft_ray.errors import ResourceError, UserError
from sdft_ray.models.families import Config
from sdft_ray.models.machine import Machine, this_machine
from sdft_ray.pipeline.changes import changes
from sdft_ray.pipeline.lengths import Lengths, estimated_lengths, row_lengths
from sdft_ray.pipeline.needs import SHORTEST_CONTEXT, Situation
from sdft_ray.pipeline.preflight import planned_configs
from sdft_ray.planning.engines import KV_BLOCK_TOKENS, least_cache_tokens, whole_blocks
from sdft_ray.planning.need import MIB, Need, num_gib
from sdft_ray.planning.shape import ModelShape
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Engine, Resources
from sdft_ray.stages.graph import State, Step
from sdft_ray.stages.spec import workers_of
from sdft_ray.stages.teacher import TeacherModel

RAY_BYTES = 700 * MIB
"""A local Ray by itself: gcs_server 45 MiB, raylet 60, its three agents in Python 340, workers that wait 90 each; and
what this process grows by beside it."""
_SPARE = 0.05
"""Share of the free memory that is left to the system."""
_LEAST_KV_BYTES = 64 * MIB
_USUAL_KV_BYTES = 256 * MIB
_KV_SHARE = 8
"""Keys and values get at most this part of the memory (one eighth), beyond one whole context."""
_MOST_ROWS, _MOST_WORKERS = 8, 2
_MOST_ROW_TOKENS = 2048
"""Of a micro-batch on CPUs. SmolLM2-135M, bfloat16, one core: 230 tokens/s with 1,024 of them, 300 with 2,048, 270 with
8,192, for three times the memory."""
_MARGIN = 1.25
"""What is chosen leaves room for a prediction that is too low by a quarter (`jobs/bench/memory.py`), if it can."""


@dataclass(frozen=True)
class StepMemory:
    """One step: what it needs at its peak, what it may have, the largest part of the need, and what was chosen."""

    step: str
    need_bytes: int
    has_bytes: int | None
    place: str
    bottleneck: str
    settings: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """`resources` without `auto`; steps in their order; sentences about what was assumed."""

    resources: Resources
    steps: tuple[StepMemory, ...] = ()
    assumed: tuple[str, ...] = ()
    machine: Machine | None = None
    budget_bytes: int | None = None
    """Main memory that all steps together may take at once; None where nobody knows."""
    needs: Mapping[str, int] = field(default_factory=dict)
    """Step -> bytes of main memory, for the scheduler."""


def plan_memory(
    recipe: Recipe,
    resources: Resources,
    teacher: TeacherModel,
    states: Mapping[str, State],
    *,
    machine: Machine | None = None,
    explaining: bool = False,
) -> MemoryPlan:
    """Choose what is `auto`, and compare what the steps that are not done need with the machine.

    Raises `ResourceError` with the smallest change that would do when a step does not fit. `machine` is this one where
    it is not given; on a cluster that is not joined yet nobody knows it. `explaining` refuses nothing, fetches nothing,
    and counts tokens without transformers.
    """
    described = teacher.described
    if described is None:
        return MemoryPlan(resources, assumed=("memory is not planned: the teacher's config.json cannot be read",))
    assumed: list[str] = []
    if machine is None and not os.environ.get("RAY_ADDRESS"):
        machine = this_machine(cpus=resources.cpus, memory_bytes=resources.memory_bytes)
    if machine is None:
        assumed.append(
            "memory is not compared: the nodes of the cluster at RAY_ADDRESS are not known before it is joined; "
            "what is auto is as for a large machine"
        )
    lengths = _lengths(recipe, teacher, states, assumed, explaining=explaining)
    planner = _Planner(recipe, resources, machine, _situation(recipe, described.config, lengths))
    missing = [state.step for state in states.values() if state.status != "done"]
    planner.choose(missing, assumed)
    steps, needs = planner.compared(missing, refuse=not explaining)
    return MemoryPlan(planner.resources, tuple(steps), tuple(assumed), machine, planner.budget("memory"), needs)


def _lengths(
    recipe: Recipe, teacher: TeacherModel, states: Mapping[str, State], assumed: list[str], *, explaining: bool
) -> Lengths:
    """Rows are read where their lengths decide something. Explaining may find no tokenizer or rows at hand."""
    decides = {"generate", "train", "correct"} & {s.step.stage for s in states.values() if s.status != "done"}
    if not decides:
        return Lengths()
    if not explaining:
        return row_lengths(recipe, teacher)
    directory, found = teacher.source.directory, Lengths()
    if directory is not None and Path(recipe.seed_set.source).is_file():
        with suppress(UserError):  # `compress` says what is wrong with the rows
            found = estimated_lengths(recipe, Path(directory))
    if found.prompt_tokens is None:
        assumed.append(
            "memory: prompts are taken to be as long as the context, since tokenizer or rows are not at hand"
        )
    return found


def _situation(recipe: Recipe, config: Config, lengths: Lengths) -> Situation:
    """The shapes of all models of a recipe; one that a measured speed decides on counts as large as the teacher."""
    whole = ModelShape.of(config)
    configs = planned_configs(recipe, config) or {}
    pruned = {name: ModelShape.of(narrow) for name, narrow in configs.items()}
    return Situation(recipe, config, whole, pruned, lengths)


class _Planner:
    def __init__(self, recipe: Recipe, resources: Resources, machine: Machine | None, situation: Situation) -> None:
        self.resources = resources
        self._recipe = recipe
        self._machine = machine
        self._situation = situation

    def budget(self, place: str, gpus: float = 1.0) -> int | None:
        """What one step may have when no other runs; None where nobody knows."""
        if self._machine is None:
            return None
        if place == "memory":
            free = int(self._machine.memory_bytes * (1 - _SPARE))
            return max(0, free - RAY_BYTES - self.resources.object_store_bytes)
        if not self._machine.gpu_bytes:
            return None
        return int(min(self._machine.gpu_bytes) * min(1.0, gpus) * (1 - _SPARE))

    def fits(self, need: Need, gpus: float = 1.0, *, margin: float = 1.0) -> bool:
        """On GPUs each process has its own; main memory is one for all."""
        has = self.budget(need.place, gpus)
        return has is None or (need.total if need.place == "memory" else need.each) * margin <= has

    # -- what is auto ---------------------------------------------------------------------------------------

    def choose(self, steps: list[Step], assumed: list[str]) -> None:
        """Replace what is `auto`, for steps that are to be made and for all others alike."""
        generate, evaluate = self.resources.generate, self.resources.evaluate
        generate = generate.model_copy(update=self._generation())
        self.resources = self.resources.model_copy(update={"generate": generate})
        found = self._evaluation(assumed if any(step.stage == "evaluate" for step in steps) else [])
        self.resources = self.resources.model_copy(update={"evaluate": evaluate.model_copy(update=found)})
        trained = [step for step in steps if step.stage in ("train", "correct")]
        train = self.resources.train.model_copy(update=self._training(trained))
        self.resources = self.resources.model_copy(update={"train": train})

    def _kv_bytes(self, settings: Engine, context: int, wanted: int) -> int:
        """Room for one whole context, and up to `wanted` of them as far as a part of the memory goes."""
        one = least_cache_tokens(context) * self._situation.token_kv_bytes(settings)
        has = self.budget("GPU memory" if settings.gpus else "memory", settings.gpus)
        most = one if has is None else max(one, has // _KV_SHARE)
        return max(one, min(most, wanted * one, 1 << 40), min(_LEAST_KV_BYTES, most))

    def _generation(self) -> dict[str, Any]:
        """Context and keys and values of the engine that rewrites."""
        settings, whole = self.resources.generate, self._situation.whole
        lengths, limit = self._situation.lengths, self._situation.most_tokens
        context = settings.context_tokens or limit
        if settings.max_model_tokens == "auto" and lengths.prompt_tokens is not None:
            context = min(limit, whole_blocks(lengths.prompt_tokens + self._recipe.generate.max_tokens))
        found: dict[str, Any] = {"max_model_tokens": context}
        if settings.kv_cache_bytes == "auto":
            at_once = max(1, min(settings.max_sequences, lengths.num_rows or settings.max_sequences))
            found["kv_cache_bytes"] = max(
                self._kv_bytes(settings, context, at_once), min(_USUAL_KV_BYTES, at_once * context * whole.kv_bytes(4))
            )
        return found

    def _evaluation(self, assumed: list[str]) -> dict[str, Any]:
        """The model's whole context, for items as long as it takes, or the largest part of it that fits."""
        settings, limit = self.resources.evaluate, self._situation.most_tokens
        context = settings.context_tokens or limit
        found: dict[str, Any] = {}
        while True:
            found = {"max_model_tokens": context}
            if settings.kv_cache_bytes == "auto":
                least = _USUAL_KV_BYTES if context > SHORTEST_CONTEXT else _LEAST_KV_BYTES
                found["kv_cache_bytes"] = max(self._kv_bytes(settings, context, 1), least)
            need = self._situation.engine_need(settings.model_copy(update=found), "evaluate")
            if self.fits(need, settings.gpus) or settings.max_model_tokens != "auto" or context <= SHORTEST_CONTEXT:
                break
            context = max(SHORTEST_CONTEXT, context // 2)
        if settings.max_model_tokens == "auto" and context < limit:
            assumed.append(
                f"evaluate.max_model_tokens is {context:,}, since memory does not hold the model's {limit:,}; longer "
                "items lose their beginning, and are counted"
            )
        return found

    def _training(self, steps: list[Step]) -> dict[str, Any]:
        """As many workers as CPUs and memory hold, and then as many rows as make them faster."""
        settings, row_tokens = self.resources.train, self._recipe.train.max_seq_len
        workers = [settings.workers] if settings.num_workers != "auto" else self._worker_counts()
        rows = [settings.micro_batch_rows]
        if settings.micro_batch_size == "auto":
            most = _MOST_ROWS if settings.gpus else max(1, min(_MOST_ROWS, _MOST_ROW_TOKENS // row_tokens))
            rows = [count for count in (_MOST_ROWS, 4, 2, 1) if count <= most]
        found: dict[str, Any] = {}
        for margin, count, size in product((_MARGIN, 1.0), workers, rows):
            found = {"num_workers": count, "micro_batch_size": size}
            tried = settings.model_copy(update=found)
            needs = [self._situation.train_need(step, tried) for step in steps]
            if all(self.fits(need, settings.gpus, margin=margin) for need in needs):
                break
        return found

    def _worker_counts(self) -> list[int]:
        settings, machine = self.resources.train, self._machine
        if machine is None:
            return [_MOST_WORKERS, 1]
        if settings.gpus:
            return [max(1, int(len(machine.gpu_bytes) / settings.gpus))] if machine.gpu_bytes else [1]
        most = int(min(_MOST_WORKERS, machine.cpus) / settings.cpus)
        return list(range(max(1, most), 0, -1))

    # -- needs against what there is ------------------------------------------------------------------------

    def compared(self, steps: list[Step], *, refuse: bool) -> tuple[list[StepMemory], dict[str, int]]:
        """Raises `ResourceError` as `plan_memory`."""
        found, needs = [], {}
        for step in steps:
            need = self._situation.need(step, self.resources)
            device = workers_of(step.stage, self.resources)
            gpus = device.gpus if device else 1.0
            self._check_cache(step, refuse=refuse)
            if refuse and not self.fits(need, gpus):
                raise self._refusal(step, need, gpus)
            asked = need.total if need.place == "memory" else need.each
            needs[step.name] = need.total if need.place == "memory" else 0
            found.append(
                StepMemory(
                    step.name, asked, self.budget(need.place, gpus), need.place, need.largest, self._settings(step)
                )
            )
        return found, needs

    def _settings(self, step: Step) -> str:
        if step.stage in ("train", "correct"):
            train = self.resources.train
            checkpointed = ", activation checkpointing" if train.activation_checkpointing else ""
            return f"{train.min_workers} x {train.micro_batch_rows} rows{checkpointed}"
        if step.stage not in ("generate", "evaluate", "why"):
            return ""
        engine: Engine = self.resources.generate if step.stage == "generate" else self.resources.evaluate
        if engine is self.resources.generate and self.resources.generate.sampler in ("server", "scripted"):
            return ""
        return f"context {engine.context_tokens or 0:,}, KV cache {num_gib(engine.kv_bytes)}"

    def _check_cache(self, step: Step, *, refuse: bool) -> None:
        """What vLLM refuses after its start: a context that the model does not have, and a KV cache that holds less
        than one whole context (blocks with a window may need less).
        """
        if step.stage not in ("generate", "evaluate", "why") or not refuse:
            return
        part = "generate" if step.stage == "generate" else "evaluate"
        settings: Any = getattr(self.resources, part)
        context, limit = settings.context_tokens or 0, self._situation.whole.context_tokens
        if settings.sampler == "vllm" and context > limit:
            raise ResourceError(
                f"{part}.max_model_tokens is {context:,}, but the model has a context of {limit:,}",
                f"leave {part}.max_model_tokens out of the resources file, or lower it",
            )
        one = least_cache_tokens(context) * self._situation.token_kv_bytes(settings)
        if settings.sampler != "vllm" or self._situation.whole.has_windows or settings.kv_bytes >= one:
            return
        held = settings.kv_bytes // self._situation.token_kv_bytes(settings)
        raise ResourceError(
            f"{part}.kv_cache_bytes is {num_gib(settings.kv_bytes)} and holds {held:,} tokens, but the context "
            f"(max_model_tokens) is {context:,}, and vLLM keeps a block of {KV_BLOCK_TOKENS} free",
            f"leave {part}.kv_cache_bytes out of the resources file, raise it to {one:,}, or lower "
            f"{part}.max_model_tokens to {max(0, held // KV_BLOCK_TOKENS - 1) * KV_BLOCK_TOKENS:,}",
        )

    def _refusal(self, step: Step, need: Need, gpus: float) -> ResourceError:
        has = self.budget(need.place, gpus) or 0
        asked = need.total if need.place == "memory" else need.each
        many = f" in {need.count} processes" if need.count > 1 and need.place == "memory" else ""
        return ResourceError(
            f"{step.name} needs {num_gib(asked)} of {need.place}{many} ({need.largest}: "
            f"{num_gib(need.terms[need.largest])}), but it may have {num_gib(has)}{self._why(need.place)}",
            self._way_out(step, asked - has, gpus),
        )

    def _why(self, place: str) -> str:
        machine = self._machine
        if machine is None or place != "memory":
            return ""
        kept = f"{num_gib(RAY_BYTES + self.resources.object_store_bytes)} is kept for Ray"
        if machine.is_limited:
            return f": the limit is {num_gib(machine.total_bytes)}, and {kept}"
        return f": of {num_gib(machine.total_bytes)} other programs hold {num_gib(machine.taken_bytes)}, and {kept}"

    def _way_out(self, step: Step, lacking: int, gpus: float) -> str:
        """The first change of those from small to large that would do."""
        for words, need in changes(self._situation, self.resources, step):
            if self.fits(need(), gpus):
                return f"{words}, or free {num_gib(lacking)} of memory"
        return f"free {num_gib(lacking)} of memory, take a larger machine, or a smaller teacher"


def smallest(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """One plan for recipes that run side by side with the same workers: the least rows and workers, and the longest
    context with the largest cache, of all.
    """
    first, *rest = plans
    resources = first.resources
    for plan in rest:
        own, other = resources, plan.resources
        train = own.train
        if other.train.min_workers * other.train.micro_batch_rows < train.min_workers * train.micro_batch_rows:
            train = other.train
        engines = {
            part: getattr(own, part).model_copy(
                update={
                    "max_model_tokens": max(getattr(one, part).context_tokens or 0 for one in (own, other)) or None,
                    "kv_cache_bytes": max(getattr(one, part).kv_bytes for one in (own, other)),
                }
            )
            for part in ("generate", "evaluate")
        }
        resources = own.model_copy(update={"train": train, **engines})
    return replace(first, resources=resources)
