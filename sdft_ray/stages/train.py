"""Stage `train`: one recovery arm on Ray Train, data-parallel, resumable from its last checkpoint.

The plain loop of `training.loop` does the work; this file gives it workers, checkpoints and a place for the student.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
from filelock import FileLock
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sdft_ray.errors import DataError, RecipeError, UserError
from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.recipe import Train
from sdft_ray.stages import checkpoints, files
from sdft_ray.stages.cached import cached_teacher, pack_with_signals, signal_counts
from sdft_ray.stages.job import Job, Made, Meter, node_id
from sdft_ray.stages.tracking import trackers_of
from sdft_ray.store.manifest import Usage

if TYPE_CHECKING:
    from sdft_ray.data.packing import PackedRows
    from sdft_ray.training.loop import StepRecord
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.parallel import Parallel
    from sdft_ray.training.plan import TrainPlan
    from sdft_ray.training.state import TrainState


def run(job: Job) -> Made:
    """Train, and hand back what rank 0 placed.

    The run's storage is the step's work directory, which is named by fingerprint, so that a new attempt can only
    continue from checkpoints of the very same recipe.
    """
    settings = job.resources.train
    per_worker: dict[str, float] = {"CPU": settings.cpus, **settings.resources}
    if settings.gpus:
        per_worker["GPU"] = settings.gpus
    storage = job.store.work_url(job.address)
    checkpoints.mend_list(storage)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if settings.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            elastic_resize_monitor_interval_s=settings.resize_every_s,
            use_gpu=bool(settings.gpus),
            resources_per_worker=per_worker,
            accelerator_type=settings.accelerator_type,
        ),
        run_config=RunConfig(
            name=checkpoints.RUN_NAME,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
        ),
    )
    made = trainer.fit().return_value
    if isinstance(made, UserError):
        raise made
    assert isinstance(made, Made), "rank 0 returns what it placed"
    return made


def _worker(config: dict[str, Any]) -> Made | UserError:
    """One rank. What all ranks find wrong alike is handed back: Ray Train would try again what it sees raised."""
    try:
        return _train(config["job"])
    except (DataError, RecipeError) as reason:
        return reason


def _train(job: Job) -> Made:
    """All ranks report equally often, as Ray Train demands; rank 0 alone writes the student."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.export import save_student
    from sdft_ray.training.loop import train
    from sdft_ray.training.lora import merged
    from sdft_ray.training.tracking import values_of

    settings = job.resources.train
    context = ray.train.get_context()
    is_first, world_size = context.get_world_rank() == 0, context.get_world_size()
    made = Made()
    with Meter(gpus=settings.gpus) as meter, ExitStack() as stack:
        data = _packed(job)
        plan = _plan(job, data.rows.num_rows)
        pruned = job.input("pruned")
        lora = job.recipe.train.lora
        # Weights that are trained need float32; under adapters they stay frozen and as short as they came.
        model: Any = load_model(pruned, job.recipe.teacher.dtype if lora else "float32")
        if settings.strategy == "ddp":  # fsdp moves block by block
            model.to(_device(job))
        model = _tuned(model, job.recipe.train, plan.seed)
        parallel = _parallel(job)
        resumed = checkpoints.resume(job.store.work_url(job.address), parallel.share)
        history = resumed.history
        teacher = _teacher(job, plan)
        cached = cached_teacher(job, data.rows)
        notes = [f"passed over a checkpoint: {why}" for why in resumed.damaged]
        trackers = stack.enter_context(trackers_of(job, plan)) if is_first else None

        def report(record: StepRecord) -> None:
            if is_first:
                history.append(asdict(record))
                job.progress(record.step, plan.num_steps, "steps")
            if trackers is not None:
                trackers.log(record.step, values_of(record, plan.num_steps))

        def save(state: TrainState) -> None:
            problem = checkpoints.save(job, state, history if is_first else None)
            notes.extend([problem] if problem else [])

        train(
            model,
            data.rows,
            plan,
            teacher=teacher,
            cached=cached,
            parallel=parallel,
            report=report,
            save=save,
            resume=resumed.state,
            name_of=partial(_example_id, job),
        )
        if is_first:
            with job.output(made) as directory:
                save_student(merged(model), pruned, directory, dtype=job.recipe.teacher.dtype)
                text = "".join(json.dumps(record) + "\n" for record in history)
                (directory / files.HISTORY).write_text(text, encoding="utf-8")
        if trackers is not None:
            notes += [f"tracking by {name} was given up: {why}" for name, why in trackers.failures.items()]
    usage = meter.usage(sum(record["num_tokens"] for record in history))
    # Ranks hold the same model and split each step evenly, so rank 0 speaks for all.
    peak = usage.peak_rss_bytes * world_size
    made.usage = Usage(usage.wall_s, usage.device_s * world_size, peak, usage.num_tokens)
    made.summary = {
        "num_steps": plan.num_steps,
        "num_rows": data.rows.num_rows,
        "num_dropped": data.num_dropped,
        "num_cut": data.num_cut,
        "num_loss_tokens": sum(record["num_loss_tokens"] for record in history),
        "last_loss": history[-1]["loss"] if history else None,
        "num_workers": world_size,
        "notes": notes,
        "node": node_id(),
        **signal_counts(job),
    }
    return made


def _plan(job: Job, num_rows: int) -> TrainPlan:
    from sdft_ray.training.plan import arm_plan

    return arm_plan(job.recipe.train, job.arm, job.resources.train, num_rows)


@dataclass(frozen=True)
class _Packed:
    """Training rows; how many were left out, and of how many the instruction was cut, because they were long."""

    rows: PackedRows
    num_dropped: int
    num_cut: int


def _packed(job: Job) -> _Packed:
    """Tokenize and pack once per shared disk; every other worker maps the file."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.data.documents import training_documents
    from sdft_ray.data.packing import PackedRows, pack

    path = job.work() / "packed.arrow"
    counts = path.with_suffix(".json")
    asked = job.recipe.train
    with FileLock(path.with_suffix(".lock")):
        if not path.exists() and job.recipe.train.arms[job.arm].objective.cached:
            pack_with_signals(job, path)
        if not path.exists():
            table = _rows(job, ["instruction", _response_column(job)])
            chat = ChatFormat(load_tokenizer(job.input("pruned")))
            pairs = zip(*(column.to_pylist() for column in table.columns), strict=True)
            made = training_documents(chat, pairs, asked.row_tokens, asked.long_rows)
            counts.write_text(json.dumps([len(made.dropped), len(made.cut)]), encoding="utf-8")
            unfinished = path.with_suffix(".partial")
            pack(made.documents, asked.row_tokens).save(unfinished)
            unfinished.rename(path)
    num_dropped, num_cut = json.loads(counts.read_text(encoding="utf-8"))
    return _Packed(PackedRows.load(path), num_dropped, num_cut)


def _response_column(job: Job) -> str:
    return "response" if job.recipe.train.arms[job.arm].data == "distilled" else "reference_response"


def _rows(job: Job, columns: list[str]) -> pa.Table:
    """Columns of the arm's training rows."""
    distilled = job.recipe.train.arms[job.arm].data == "distilled"
    return pq.read_table(job.input("data") / (files.DISTILLED if distilled else files.ROWS), columns=columns)


def _example_id(job: Job, index: int) -> str:
    """What the user calls a training row; read when something is wrong with it."""
    return _rows(job, ["example_id"])["example_id"][index].as_py()


def _device(job: Job) -> Literal["cpu", "cuda"]:
    return "cuda" if job.resources.train.gpus else "cpu"


def _parallel(job: Job) -> Parallel:
    """The process group that Ray Train has set up, as the resources want it used."""
    from sdft_ray.training.parallel import Ddp
    from sdft_ray.training.sharding import Fsdp

    settings = job.resources.train
    if settings.strategy == "ddp":
        return Ddp()
    return Fsdp(_device(job), reshard_after_forward=settings.reshard_after_forward, reduce_once=settings.reduce_once)


def _teacher(job: Job, plan: TrainPlan) -> Teacher | None:
    """The unpruned model, where the arm's objective compares with it."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.objective import mapped_blocks

    if not plan.objective.needs_teacher:
        return None
    model: Any = load_model(job.model("teacher"), job.recipe.teacher.dtype)
    block_map: list[int] = []
    if plan.objective.matches:
        pruning = PruningPlan.from_json((job.input("plan") / files.PLAN).read_text(encoding="utf-8"))
        block_map = mapped_blocks(pruning.keep_blocks, pruning.num_blocks)
    return Teacher(model.to(_device(job)), block_map)


def _tuned(model: Any, asked: Train, seed: int) -> Any:
    """The model with what the recipe tunes left trainable: adapters, its tail, or everything."""
    if asked.tail_blocks is not None:
        from sdft_ray.training.tail import tune_tail

        return tune_tail(model, asked.tail_blocks)
    if asked.lora is None:
        return model
    from sdft_ray.models.families import family_of
    from sdft_ray.training.lora import attach

    targets = family_of(model.config.to_dict()).lora_targets
    return attach(model, asked.lora.rank, asked.lora.alpha, asked.lora.dropout, targets, seed=seed)
