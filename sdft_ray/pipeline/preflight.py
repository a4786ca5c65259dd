"""Fail-fast checks that run before any worker starts."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from sdft_ray.errors import DataError, PlanError, RecipeError, ResourceError, StoreError
from sdft_ray.generation.footprint import PassBytes, pass_bytes
from sdft_ray.models.bfloat16 import bfloat16_state
from sdft_ray.models.config import config_with_blocks
from sdft_ray.models.families import Config, check_patchable, num_blocks_of
from sdft_ray.models.machine import local_cpus
from sdft_ray.models.precision import Hardware, choose, is_exact_enough
from sdft_ray.models.size import ModelSize, size_of
from sdft_ray.pipeline.row_checks import check_calibration, check_prompts
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Engine, Resources
from sdft_ray.stages.graph import State, check_inputs
from sdft_ray.stages.sources import embedding_source, task_places
from sdft_ray.stages.spec import STAGES, DiskEstimate
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.store import Store


def preflight(
    recipe: Recipe,
    store: Store,
    resources: Resources,
    states: dict[str, State],
    teacher: TeacherModel | None = None,
    *,
    tell: Callable[[str], None] = lambda sentence: None,
) -> None:
    """Raise the `UserError` of the first thing that cannot work. Reads headers and rows, never weights.

    `teacher` is the recipe's, where it has been resolved. `tell` gets what was understood of the rows, and what is
    left out.
    """
    teacher = teacher or TeacherModel.of(recipe.teacher, recipe.chat)
    check_local_cpus(resources, {s.step.stage for s in states.values() if s.status != "done"})
    check_sampler(recipe, resources, states)
    check_precision(recipe, resources, tests_bfloat16=True)
    check_strategy(recipe, resources)
    check_tracking(store, resources, states)
    for state in states.values():
        if state.status != "done":
            check_inputs(state.step, states)
    described = teacher.described
    sizes = planned_sizes(recipe, described.config) if described else None
    if sizes is not None:
        check_tail(recipe, sizes[""])
    if described and any(part.patch for part in recipe.prunings.values()):
        check_patchable(described.family)
    sentences: list[str] = []
    num_rows = check_rows(recipe, runs_code_here=_runs_code_here(states), tell=sentences.append)
    if described and sizes:
        generated = pass_bytes(recipe.generate, described.config, num_rows)
        check_disk(recipe, store, described.size, sizes, generated, states)
    if any(state.status != "done" for state in states.values() if state.step.stage in {"seed", "evaluate"}):
        check_tasks(recipe)
    check_teacher(teacher.directory)
    check_configs(recipe, teacher.fetched.config)
    sentences += check_prompts(recipe, resources, teacher)
    check_calibration(recipe, teacher)
    check_forgetting(recipe, teacher)
    for sentence in sentences:  # an error stands alone
        tell(sentence)


def planned_size(recipe: Recipe, config: Config) -> ModelSize | None:
    """Size after all prunings; otherwise as `planned_sizes`."""
    sizes = planned_sizes(recipe, config)
    return None if sizes is None else sizes[""]


def planned_sizes(recipe: Recipe, config: Config) -> dict[str, ModelSize] | None:
    """Size after each pruning; otherwise as `planned_configs`."""
    configs = planned_configs(recipe, config)
    return None if configs is None else {name: size_of(narrow) for name, narrow in configs.items()}


def planned_configs(recipe: Recipe, config: Config) -> dict[str, Config] | None:
    """Config after each pruning, by its name (`Recipe.prunings`), None where a measured speed decides.

    Raises `PlanError` when a target cannot be met, or gives a model that could not be loaded, `ModelError` when
    unsupported.
    """
    from sdft_ray.pruning.plan import resolve_num_removed
    from sdft_ray.pruning.target import candidates, resolve_target
    from sdft_ray.pruning.width import narrowed_config

    configs: dict[str, Config] = {}
    for name, part in recipe.prunings.items():
        if part.target is not None and part.target.is_measured:
            candidates(part.depth, part.width, config, dtype=recipe.teacher.dtype)
            return None
        depth, width = resolve_target(part, config, dtype=recipe.teacher.dtype)
        num_removed = resolve_num_removed(depth, config)
        if part.patch and not num_removed:
            raise PlanError("patch replaces removed blocks, but no block is removed", "remove patch from the recipe")
        num_blocks = num_blocks_of(config) - num_removed
        narrow = narrowed_config(width, config)
        config = config_with_blocks(narrow, range(num_blocks))  # whichever blocks stay, they are of one size
        configs[name] = config
    return configs


def check_configs(recipe: Recipe, config: Config) -> None:
    """Raise `ModelError` unless stock transformers can build the teacher and every pruned model of these configs."""
    from sdft_ray.models.loading import check_config

    check_config(config, "the teacher", "restore its config.json, or take a checkpoint that transformers can load")
    for name, narrow in (planned_configs(recipe, config) or {}).items():
        check_config(narrow, f"the model after {name or 'pruning'}", "choose other sizes in depth and width")


def check_tail(recipe: Recipe, pruned: ModelSize) -> None:
    """Raise `RecipeError` when more layers are to be trained than the pruned model has."""
    wanted = recipe.train.train_last_n_layers
    if wanted is not None and wanted > pruned.num_blocks:
        raise RecipeError(
            f"train.train_last_n_layers is {wanted} and the pruned model has {pruned.num_blocks} blocks",
            "lower it, or remove it to train all weights",
        )


def check_local_cpus(resources: Resources, stages: set[str]) -> None:
    """Raise `ResourceError` where a Ray that is started here has fewer CPUs than a stage needs at once."""
    from sdft_ray.stages.registry import check_capacity
    from sdft_ray.stages.session import Capacity

    if os.environ.get("RAY_ADDRESS"):
        return  # the cluster's own figures are checked once it is joined
    check_capacity(stages, resources, Capacity(float(resources.cpus or local_cpus()), float("inf")))


def check_sampler(recipe: Recipe, resources: Resources, states: Mapping[str, State]) -> None:
    """Raise `ResourceError` for signals that the sampler of the resources cannot record."""
    if states["generate"].status != "done":
        from sdft_ray.generation.sampler import check_signals

        check_signals(resources.generate.sampler, recipe.generate)


def check_precision(recipe: Recipe, resources: Resources, *, tests_bfloat16: bool = False) -> None:
    """Raise `ResourceError` for engines that would be less exact than the recipe: its identity says how exact.

    Likewise for bfloat16 on CPUs of this machine where it would end the engine; see `models.bfloat16.bfloat16_state`.
    """
    wanted = recipe.teacher.dtype
    for name in ("generate", "evaluate"):
        part: Engine = getattr(resources, name)
        if not is_exact_enough(part.dtype, wanted):
            raise ResourceError(
                f"{name}.dtype is {part.dtype}, which is less exact than {wanted}, the recipe's teacher.dtype",
                f"remove {name}.dtype from the resources, or set teacher.dtype: {part.dtype} in the recipe",
            )
        if part.dtype == "bfloat16" and not part.gpus and not os.environ.get("RAY_ADDRESS"):
            choose(part.dtype, wanted, Hardware(bfloat16=bfloat16_state(test=tests_bfloat16)), float32_bytes=0)


def check_strategy(recipe: Recipe, resources: Resources) -> None:
    """Raise `ResourceError` for Muon with sharded weights: it orthogonalizes whole matrices, which no worker holds."""
    if resources.train.strategy == "fsdp" and recipe.train.optimizer == "muon":
        raise ResourceError(
            "train.optimizer muon needs whole matrices, but with strategy fsdp each worker holds a part of them",
            "set resources train.strategy to ddp, or the recipe's train.optimizer to adamw",
        )


def check_tracking(store: Store, resources: Resources, states: Mapping[str, State]) -> None:
    """Raise `ResourceError` for trackers that are not installed here or cannot write to the store."""
    stages = {state.step.stage for state in states.values() if state.status != "done"}
    if resources.train.tracking and stages & {"train", "correct"}:
        from sdft_ray.training.tracking import check_trackers

        check_trackers(resources.train.tracking, store.url)


def check_disk(
    recipe: Recipe,
    store: Store,
    teacher: ModelSize,
    sizes: Mapping[str, ModelSize],
    generated: PassBytes,
    states: Mapping[str, State],
) -> None:
    """Estimate what the missing steps write: one pruned model per checkpoint, with optimizer states in training.

    `sizes` are those after each pruning, by its name; a corrected teacher is written like a student.
    Of generation the upper bound counts once: its parts and its table lie side by side for a moment, but responses
    are seldom half as long as they may be.
    """
    free = store.free_bytes()
    if free is None:
        return
    needed = 64 * 2**20
    for step in (state.step for state in states.values() if state.status != "done"):
        train = recipe.for_pruning(step.subject).train
        estimate = DiskEstimate(sizes.get(step.subject, sizes[""]), train, generated.total or 0)
        if step.subject == "teacher" and recipe.correction is not None:
            estimate = DiskEstimate(teacher, recipe.correction, estimate.generated_bytes)
        needed += STAGES[step.stage].writes(estimate)
    if needed > free:
        raise StoreError(
            f"store {store.url} has {free / 2**30:.1f} GiB free, but about {needed / 2**30:.1f} GiB are needed",
            "free some space or choose another disk with --store",
        )


def _runs_code_here(states: Mapping[str, State]) -> bool:
    """Whether responses of answer kind `code` are still to be checked, by workers of this machine."""
    missing = any(states[name].status != "done" for name in ("generate", "select"))
    return missing and not os.environ.get("RAY_ADDRESS")


def check_rows(
    recipe: Recipe, *, runs_code_here: bool = False, tell: Callable[[str], None] = lambda sentence: None
) -> int:
    """Read both row sources to the end, so that a malformed line 49,999 is reported now; the seed set's rows.

    Rows that share words with a test question are counted too; of the others some must be held out if any are to be.
    With `runs_code_here`, rows of answer kind `code` need the sandbox on this machine (`SandboxError`).
    """
    from sdft_ray.data.held_out import is_held_out
    from sdft_ray.data.reading import Reading
    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.checks import check_error
    from sdft_ray.generation.prompts import resolve_template

    resolve_template(recipe.generate.template)
    calibration, reading = Reading(), Reading()
    deque(read_source(recipe.calibration, check_error, reading=calibration), maxlen=0)
    fraction = recipe.train.validation_fraction
    num_rows = num_held_out = 0
    answer_kinds: set[str] = set()
    for table in read_source(recipe.seed_set, check_error, turns=recipe.train.turns, reading=reading):
        num_rows += table.num_rows
        answer_kinds |= set(table["answer_kind"].unique().to_pylist())
        if fraction:
            num_held_out += sum(is_held_out(name, fraction) for name in table["example_id"].to_pylist())
    for name, read in (("calibration set", calibration), ("seed set", reading)):
        if sentences := read.sentences():
            tell(f"{name}: {' '.join(sentences)}")
    if runs_code_here and "code" in answer_kinds:
        from sdft_ray.generation.sandbox import check_sandbox

        check_sandbox()
    if fraction and not 0 < num_held_out < num_rows:
        raise DataError(
            f"train.validation_fraction {fraction:g} holds out {num_held_out} of {num_rows} rows",
            "change it until there are rows on both sides, or take a larger seed set",
        )
    for name, arm in recipe.train.arms.items():
        if arm.num_rows is not None and arm.num_rows > num_rows - num_held_out:
            raise DataError(
                f"train.arms.{name}.num_rows is {arm.num_rows:,}, but there are only "
                f"{num_rows - num_held_out:,} training rows",
                "lower it, take a larger seed set, or remove it to use all rows",
            )
    return num_rows


def check_teacher(directory: Path) -> None:
    """Headers, lengths, expected tensors and vocabulary of the teacher's files."""
    from sdft_ray.models.checkpoint import Checkpoint

    Checkpoint.open(directory).check_expected()


def check_forgetting(recipe: Recipe, teacher: TeacherModel) -> None:
    """Raise `DataError` for texts that the teacher cannot score, `ModelError` for a model that gives no embeddings."""
    asked = recipe.forgetting
    if asked is None:
        return
    if asked.source == recipe.seed_set.source:
        raise DataError(
            "forgetting.source is the seed set, which is training data", "give text that is not used for training"
        )
    from sdft_ray.data.calibration import row_documents
    from sdft_ray.data.rows import read_spread
    from sdft_ray.generation.checks import check_error

    context = teacher.fetched.context_tokens
    for table in read_spread(asked, check_error):
        documents = row_documents(table, teacher.tokenizer, asked.max_tokens)
        for name, document in zip(table["example_id"].to_pylist(), documents, strict=True):
            if not any(document.loss_mask[1:]):
                raise DataError(
                    f"row {name} of forgetting has no token to score among its first {asked.max_tokens}",
                    "remove the row, or raise forgetting.max_tokens",
                )
            if len(document.ids) > context:
                raise DataError(
                    f"row {name} of forgetting has {len(document.ids)} tokens, but the teacher's context is {context}",
                    f"set forgetting.max_tokens to {context} or fewer",
                )
    if asked.embedding is not None:
        from sdft_ray.evaluation.similarity import check_embedder

        check_embedder(embedding_source(asked).fetch())


def check_tasks(recipe: Recipe) -> None:
    """Raise `EvaluationError` for unknown tasks, bad task files, and bad local data.

    Tasks whose data is here are loaded with it, so that what lm-eval would refuse is refused now.
    """
    from sdft_ray.evaluation.tasks import check_tasks as check_loaded

    evaluate = recipe.evaluate
    metrics = {task.name: task.metric for task in evaluate.tasks}
    check_loaded([*evaluate.shots], task_places(recipe), evaluate.shots, metrics)
