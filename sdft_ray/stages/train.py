"""Stage `train`: one recovery arm on Ray Train, data-parallel, resumable from its last checkpoint.

The plain loop of `training.loop` does the work; this file gives it workers, checkpoints and a place for the student.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sdft_ray.errors import DataError, DivergenceError, ModelError, RecipeError, UserError
from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.recipe.arms import Train
from sdft_ray.stages import checkpoints
from sdft_ray.stages.attempts import until_it_fits
from sdft_ray.stages.cached import cached_teacher
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, node_id
from sdft_ray.stages.tracking import trackers_of
from sdft_ray.stages.training_rows import TrainingRows, training_rows
from sdft_ray.stages.views import train_view
from sdft_ray.store import files
from sdft_ray.store.manifest import Usage

if TYPE_CHECKING:
    from sdft_ray.training.loop import StepRecord
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.parallel import Parallel
    from sdft_ray.training.plan import TrainPlan
    from sdft_ray.training.state import TrainState


def run(job: StageContext) -> StageResult:
    """Train, and hand back what rank 0 placed. `attempts.until_it_fits` says what is tried after a failure."""
    result, notes = until_it_fits(job, _fit)
    if isinstance(result, UserError):
        raise result
    assert isinstance(result, StageResult), "rank 0 returns what it placed"
    result.summary["notes"] = [*notes, *result.summary["notes"]]
    return result


def _fit(job: StageContext) -> Any:
    """One attempt; what `_worker` returned on rank 0.

    The run's storage is the step's work directory, which is named by fingerprint, so that a new attempt can only
    continue from checkpoints of the very same recipe.
    """
    settings = job.resources.train
    per_worker: dict[str, float] = {"CPU": settings.cpus, **settings.resources}
    if settings.gpus:
        per_worker["GPU"] = settings.gpus
    storage = job.store.work_url(job.address)
    checkpoints.repair_checkpoint_index(storage)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if settings.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            elastic_resize_monitor_interval_s=settings.resize_every_s,
            use_gpu=bool(settings.gpus),
            resources_per_worker=per_worker,
            accelerator_type=settings.accelerator_type,
        ),
        run_config=RunConfig(
            name=checkpoints.RUN_NAME,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
        ),
    )
    return trainer.fit().return_value


def _worker(config: dict[str, Any]) -> StageResult | UserError:
    """One rank. What all ranks find wrong alike is handed back: Ray Train would try again what it sees raised."""
    try:
        return _train(config["job"])
    except (DataError, ModelError, RecipeError) as reason:
        return reason


def _train(job: StageContext) -> StageResult:
    """All ranks report equally often, as Ray Train demands; rank 0 alone writes the student."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.loop import train
    from sdft_ray.training.tracking import values_of

    settings = job.resources.train
    context = ray.train.get_context()
    is_first, world_size = context.get_world_rank() == 0, context.get_world_size()
    result = StageResult()
    with UsageMeter(gpus=settings.gpus) as meter, ExitStack() as stack:
        job.phase("preparing the rows")
        data = training_rows(job)
        job.phase("loading the model")
        plan = _plan(job, data.rows.num_rows)
        asked = train_view(job.step)
        # Weights that are trained need float32; under adapters they stay frozen and as short as they came.
        # A correction has no pruned model: it trains the teacher itself.
        model: Any = load_model(job.model("pruned"), job.teacher.dtype if asked.lora else "float32")
        if settings.strategy == "ddp":  # fsdp moves block by block
            model.to(_device(job))
        model = tuned(model, asked, plan.seed)
        parallel = _parallel(job)
        resumed = checkpoints.resume(job, parallel.share)
        history = resumed.history
        notes = [f"skipped a damaged checkpoint: {why}" for why in resumed.damaged]
        trackers = stack.enter_context(trackers_of(job, plan)) if is_first else None

        def report(record: StepRecord) -> None:
            if is_first:
                history.append(asdict(record))
                job.progress(record.step, plan.num_steps, "steps")
            if trackers is not None:
                trackers.log(record.step, values_of(record, plan.num_steps))

        def save(state: TrainState) -> None:
            problem = checkpoints.save(job, state, history if is_first else None)
            if problem:
                notes.append(problem)
                job.notice(f"{job.step.name}: {problem}")

        try:
            train(
                model,
                data.rows,
                plan,
                teacher=_teacher(job, plan),
                cached=cached_teacher(job, data.rows),
                parallel=parallel,
                report=report,
                save=save,
                resume=resumed.take(),
                name_of=data.name_of,
            )
            outcome = _held_out(job, model, parallel, is_first=is_first)
        except DivergenceError as error:  # on all ranks alike, or after the last of their exchanges
            if not job.step.trial:
                raise
            outcome = {"diverged": error.message}  # the other trials of its arm go on
        if is_first:
            _place(job, result, None if "diverged" in outcome else model, history)
        if trackers is not None:
            notes += [f"tracking with {name} was stopped: {why}" for name, why in trackers.failures.items()]
    usage = meter.usage(sum(record["num_tokens"] for record in history))
    # Ranks hold the same model, or equal shares, and split each step evenly, so rank 0 speaks for all.
    peak = usage.peak_rss_bytes * world_size
    result.usage = Usage(usage.wall_s, usage.device_s * world_size, peak, usage.num_tokens)
    result.summary = {**_figures(data, plan, history), "num_workers": world_size, "notes": notes, "node": node_id()}
    result.summary |= outcome
    return result


def _figures(data: TrainingRows, plan: TrainPlan, history: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "num_steps": plan.num_steps,
        "num_rows": data.rows.num_rows,
        **data.counts,
        "num_loss_tokens": sum(record["num_loss_tokens"] for record in history),
        "last_loss": history[-1]["loss"] if history else None,
    }


def _place(job: StageContext, result: StageResult, model: Any, history: list[dict[str, Any]]) -> None:
    """Write the student, where there is one, and how it was trained."""
    from sdft_ray.training.export import save_student
    from sdft_ray.training.lora import merged

    job.phase("writing the student")
    with job.output(result) as directory:
        if model is not None:
            save_student(merged(model), job.model("pruned"), directory, dtype=job.teacher.dtype)
        text = "".join(json.dumps(record) + "\n" for record in history)
        (directory / files.HISTORY).write_text(text, encoding="utf-8")


def _held_out(job: StageContext, model: Any, parallel: Parallel, *, is_first: bool) -> dict[str, Any]:
    """What the trained model loses on the held-out rows; nothing where there are none.

    All ranks share them, but for sharded training, after which rank 0 alone holds the model.
    """
    from sdft_ray.training.held_out import held_out_loss
    from sdft_ray.training.parallel import Single

    settings = job.resources.train
    sharded = settings.strategy == "fsdp"
    if not train_view(job.step).validation_fraction or (sharded and not is_first):
        return {}
    job.phase("measuring the loss on held-out rows")
    rows = training_rows(job, held_out=True).rows
    loss = held_out_loss(
        model,
        rows,
        parallel=Single() if sharded else parallel,
        micro_batch_rows=settings.micro_batch_rows,
        precision=settings.precision,
    )
    num_rows = int(rows.document_ids_NT.max()) + 1
    return {"held_out_loss": loss, "num_held_out_rows": num_rows, "num_held_out_tokens": rows.num_loss_tokens}


def _plan(job: StageContext, num_rows: int) -> TrainPlan:
    from sdft_ray.training.plan import arm_plan

    return arm_plan(train_view(job.step), job.step.label, job.resources.train, num_rows)


def _device(job: StageContext) -> Literal["cpu", "cuda"]:
    return "cuda" if job.resources.train.gpus else "cpu"


def _parallel(job: StageContext) -> Parallel:
    """The process group that Ray Train has set up, as the resources want it used."""
    from sdft_ray.training.parallel import ReplicatedParallel
    from sdft_ray.training.sharding import ShardedParallel

    settings = job.resources.train
    if settings.strategy == "ddp":
        return ReplicatedParallel()
    return ShardedParallel(
        _device(job), reshard_after_forward=settings.reshard_after_forward, reduce_once=settings.reduce_once
    )


def _teacher(job: StageContext, plan: TrainPlan) -> Teacher | None:
    """The unpruned model, corrected where the recipe says so, where the arm's objective compares with it."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.models.vocabulary import check_same_tokenizer
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.objective import mapped_blocks

    if not plan.objective.needs_teacher:
        return None
    directory = job.model("online_teacher")
    check_same_tokenizer(directory, job.model("pruned"), "a student is compared with the model that it came from")
    model: Any = load_model(directory, job.teacher.dtype)
    block_map: list[int] = []
    if plan.objective.matches:
        pruning = PruningPlan.from_json((job.input("plan") / files.PLAN).read_text(encoding="utf-8"))
        block_map = mapped_blocks(pruning.keep_blocks, pruning.num_blocks)
    return Teacher(model.to(_device(job)), block_map)


def tuned(model: Any, asked: Train, seed: int) -> Any:
    """The model with what the recipe tunes left trainable: adapters, its tail, or everything."""
    if asked.train_last_n_layers is not None:
        from sdft_ray.training.tail import tune_tail

        return tune_tail(model, asked.train_last_n_layers)
    if asked.lora is None:
        return model
    from sdft_ray.models.families import family_of
    from sdft_ray.training.lora import attach

    targets = family_of(model.config.to_dict()).lora_targets
    return attach(model, asked.lora.rank, asked.lora.alpha, asked.lora.dropout, targets, seed=seed)
