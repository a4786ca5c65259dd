"""Stage `train`: one recovery arm on Ray Train, data-parallel, resumable from its last checkpoint.

The plain loop of `training.loop` does the work; this file gives it workers, checkpoints and a place for the student.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import ray.train
from filelock import FileLock
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sdft_ray.errors import DivergenceError
from sdft_ray.pruning.plan import PruningPlan
from sdft_ray.recipe import Train
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter, node_id
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
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if settings.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=bool(settings.gpus),
            resources_per_worker=per_worker,
            accelerator_type=settings.accelerator_type,
        ),
        run_config=RunConfig(
            name="attempts",
            storage_path=job.store.work_url(job.address),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    made = trainer.fit().return_value
    assert isinstance(made, Made), "rank 0 returns what it placed"
    return made


def _worker(config: dict[str, Any]) -> Made:
    """One rank. All ranks report equally often, as Ray Train demands; rank 0 alone writes."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.export import save_student
    from sdft_ray.training.loop import train
    from sdft_ray.training.lora import merged
    from sdft_ray.training.parallel import Ddp

    job: Job = config["job"]
    settings = job.resources.train
    is_first = ray.train.get_context().get_world_rank() == 0
    made = Made()
    with Meter(gpus=settings.gpus) as meter:
        rows = _packed(job)
        plan = _plan(job, rows.num_rows)
        pruned = job.model("pruned")  # a correction has none: it trains the teacher itself
        lora = job.recipe.train.lora
        # Weights that are trained need float32; under adapters they stay frozen and as short as they came.
        model: Any = load_model(pruned, job.recipe.teacher.dtype if lora else "float32")
        model.to(_device(job))
        model = _tuned(model, job.recipe.train, plan.seed)
        state, history = _resumed()
        teacher = _teacher(job, plan)

        def report(record: StepRecord) -> None:
            if is_first:
                history.append(asdict(record))
                job.progress(record.step, plan.num_steps, "steps")

        def save(state: TrainState) -> None:
            _checkpoint(state, history if is_first else None)

        parallel = Ddp()
        outcome: dict[str, Any] = {}
        try:
            train(model, rows, plan, teacher=teacher, parallel=parallel, report=report, save=save, resume=state)
            outcome = _held_out(job, model, parallel)
        except DivergenceError as error:  # on all ranks alike
            if job.arm in job.recipe.train.arms:
                raise
            outcome = {"diverged": error.message}  # the other trials of its arm go on
        if is_first:
            with job.output(made) as directory:
                if "diverged" not in outcome:
                    save_student(merged(model), pruned, directory, dtype=job.recipe.teacher.dtype)
                text = "".join(json.dumps(record) + "\n" for record in history)
                (directory / files.HISTORY).write_text(text, encoding="utf-8")
    usage = meter.usage(sum(record["num_tokens"] for record in history))
    # Ranks hold the same model and split each step evenly, so rank 0 speaks for all.
    peak = usage.peak_rss_bytes * settings.num_workers
    made.usage = Usage(usage.wall_s, usage.device_s * settings.num_workers, peak, usage.num_tokens)
    made.summary = {
        "num_steps": plan.num_steps,
        "num_rows": rows.num_rows,
        "num_loss_tokens": sum(record["num_loss_tokens"] for record in history),
        "last_loss": history[-1]["loss"] if history else None,
        "node": node_id(),
        **outcome,
    }
    return made


def _held_out(job: Job, model: Any, parallel: Parallel) -> dict[str, Any]:
    """What the trained model loses on the held-out rows; nothing where there are none."""
    from sdft_ray.training.held_out import held_out_loss

    if not job.recipe.train.held_out:
        return {}
    rows = _packed(job, held_out=True)
    settings = job.resources.train
    micro_batch_rows, precision = settings.micro_batch_rows, settings.precision
    loss = held_out_loss(model, rows, parallel=parallel, micro_batch_rows=micro_batch_rows, precision=precision)
    num_rows = int(rows.document_ids_NT.max()) + 1
    return {"held_out_loss": loss, "num_held_out_rows": num_rows, "num_held_out_tokens": rows.num_loss_tokens}


def _plan(job: Job, num_rows: int) -> TrainPlan:
    from sdft_ray.training.plan import arm_plan

    return arm_plan(job.recipe.train, job.arm, job.resources.train, num_rows)


def _packed(job: Job, *, held_out: bool = False) -> PackedRows:
    """Tokenize and pack once per shared disk; every other worker maps the file. Held-out rows have their own."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.data.held_out import part
    from sdft_ray.data.packing import PackedRows, pack

    path = job.work() / ("held_out.arrow" if held_out else "packed.arrow")
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            distilled = job.recipe.train.trials[job.arm].data == "distilled"
            table = pq.read_table(job.input("data") / (files.DISTILLED if distilled else files.ROWS))
            table = part(table, job.recipe.train.held_out, held_out=held_out)
            responses = table["response" if distilled else "reference_response"].to_pylist()
            chat = ChatFormat(load_tokenizer(job.model("pruned")))
            pairs = zip(table["instruction"].to_pylist(), responses, strict=True)
            documents = [chat.encode(instruction, response) for instruction, response in pairs]
            partial = path.with_suffix(".partial")
            pack(documents, job.recipe.train.row_tokens).save(partial)
            partial.rename(path)
    return PackedRows.load(path)


def _device(job: Job) -> str:
    return "cuda" if job.resources.train.gpus else "cpu"


def _teacher(job: Job, plan: TrainPlan) -> Teacher | None:
    """The unpruned model, corrected where the recipe says so, where the arm's objective compares with it."""
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.objective import mapped_blocks

    if not plan.objective.needs_teacher:
        return None
    model: Any = load_model(job.model("online_teacher"), job.recipe.teacher.dtype)
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


def _resumed() -> tuple[TrainState | None, list[dict[str, Any]]]:
    """State and history of the last checkpoint, if there is one."""
    from sdft_ray.training.state import load_state

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None, []
    with checkpoint.as_directory() as directory:
        text = (Path(directory) / files.HISTORY).read_text(encoding="utf-8")
        return load_state(Path(directory)), [json.loads(line) for line in text.splitlines()]


def _checkpoint(state: TrainState, history: list[dict[str, Any]] | None) -> None:
    """Report a checkpoint; ranks without a history report nothing but take part."""
    from sdft_ray.training.state import save_state

    if history is None:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory() as directory:
        save_state(Path(directory), state)
        text = "".join(json.dumps(record) + "\n" for record in history)
        (Path(directory) / files.HISTORY).write_text(text, encoding="utf-8")
        ray.train.report({"step": state.step}, checkpoint=Checkpoint.from_directory(directory))
