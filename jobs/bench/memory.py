"""Predicted against measured memory of measuring, generating, training and evaluating, at the peak of a process.

    python jobs/bench/memory.py [MODEL] [--only WORD] [--quick]

Each setting runs in a process of its own (two of training in two), over random texts: the same code that a stage runs,
without Ray's queues. Predicted is what `sdft_ray.planning` computes from config.json and the settings, before anything
runs; measured is the high-water mark of resident memory, libraries included. MODEL is a checkpoint of some hundred
million parameters at most, beside which the laboratory's teacher is measured; without one, the teacher alone.

A setting counts if predicted / measured is within a quarter of 1. The last line is JSON: `ratio` is the share of those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft_ray.lab.export import TEACHER
from sdft_ray.planning.engines import Work, transformers_need, vllm_need
from sdft_ray.planning.need import MIB, Need
from sdft_ray.planning.passes import measure_need
from sdft_ray.planning.shape import ModelShape, dtype_bytes
from sdft_ray.planning.training import Training, worker_need
from sdft_ray.recipe.arms import Lora, Objective
from sdft_ray.recipe.resources import Train

BOUND_RATIO, WITHIN = 1.0, 0.25


@dataclass(frozen=True)
class Setting:
    """One piece of work. `row_tokens` are those of a packed row, a calibration row, or a prompt."""

    stage: str
    dtype: str = "float32"
    num_rows: int = 1
    """Rows of a micro-batch; sequences that an engine is asked; rows of the calibration set."""
    row_tokens: int = 512
    document_tokens: int = 128
    new_tokens: int = 32
    kv_mib: int = 256
    context: int = 1024
    sampler: str = "vllm"
    checkpointing: bool = False
    num_workers: int = 1
    lora: bool = False
    teacher: bool = False
    losses: bool = False
    batch_tokens: int = 4096


SETTINGS: dict[str, Setting] = {
    "measure, float32": Setting("measure", num_rows=8),
    "measure, bfloat16, losses": Setting("measure", "bfloat16", num_rows=8, row_tokens=256, losses=True),
    "train, 1 row": Setting("train", "bf16"),
    "train, 4 rows": Setting("train", "bf16", num_rows=4),
    "train, 2 rows, float32": Setting("train", "fp32", num_rows=2),
    "train, 2 rows, long documents": Setting("train", "bf16", num_rows=2, document_tokens=500),
    "train, 4 rows, checkpointing": Setting("train", "bf16", num_rows=4, checkpointing=True),
    "train, 4 short rows, teacher": Setting("train", "bf16", num_rows=4, row_tokens=256, teacher=True),
    "train, 2 long rows, teacher": Setting(
        "train", "bf16", num_rows=2, row_tokens=1024, document_tokens=250, teacher=True
    ),
    "train, 2 rows, LoRA": Setting("train", "bf16", num_rows=2, lora=True),
    "train, 2 workers": Setting("train", "bf16", num_rows=2, row_tokens=256, num_workers=2),
    "generate, vLLM, float32": Setting("generate", num_rows=24, row_tokens=256),
    "generate, vLLM, bfloat16": Setting("generate", "bfloat16", num_rows=48, row_tokens=256, kv_mib=512, context=2048),
    "generate, vLLM, long context": Setting("generate", num_rows=8, row_tokens=2000, kv_mib=512, context=8192),
    "generate, transformers": Setting("generate", num_rows=16, row_tokens=256, sampler="transformers"),
    "evaluate, vLLM, float32": Setting("evaluate", num_rows=24, row_tokens=256),
    "evaluate, vLLM, long items": Setting("evaluate", num_rows=4, row_tokens=1500, context=2048),
    "evaluate, transformers": Setting("evaluate", num_rows=32, row_tokens=256, sampler="transformers"),
}
LABORATORY = {
    "laboratory, measure": Setting("measure", num_rows=32, row_tokens=128),
    "laboratory, train, 8 rows": Setting("train", "bf16", num_rows=8, document_tokens=64),
    "laboratory, train, float32": Setting("train", "fp32", num_rows=8, document_tokens=64),
    "laboratory, generate": Setting("generate", num_rows=64, row_tokens=96, kv_mib=64, context=256),
    "laboratory, evaluate": Setting("evaluate", num_rows=64, row_tokens=96, kv_mib=64, context=256),
}
QUICK = ("laboratory, measure", "laboratory, train, 8 rows", "train, 1 row", "measure, float32")


# -- predicted -----------------------------------------------------------------------------------------------


def predicted(model: Path, setting: Setting) -> Need:
    """What the planner says, from the config alone."""
    shape = ModelShape.of(json.loads((model / "config.json").read_text(encoding="utf-8")))
    if setting.stage == "train":
        work = Training(
            shape,
            objective(setting),
            row_tokens=setting.row_tokens,
            document_tokens=setting.document_tokens,
            rows_per_step=2 * setting.num_rows * setting.num_workers,
            dtype_bytes=4,
            lora=Lora() if setting.lora else None,
            teacher=shape if setting.teacher else None,
        )
        settings = Train(precision=setting.dtype, activation_checkpointing=setting.checkpointing)  # type: ignore[arg-type]
        return worker_need(work, settings, num_workers=setting.num_workers, micro_batch_rows=setting.num_rows)
    element = dtype_bytes(setting.dtype, shape)
    if setting.stage == "measure":
        return measure_need(
            shape, element, batch_tokens=setting.batch_tokens, max_tokens=setting.row_tokens, losses=setting.losses
        )
    scores = setting.stage == "evaluate"
    work = Work(
        setting.num_rows,
        0 if scores else setting.row_tokens,
        0 if scores else setting.new_tokens,
        setting.row_tokens if scores else 0,
        setting.num_rows * (setting.row_tokens + setting.new_tokens),
    )
    if setting.sampler == "transformers":
        return transformers_need(shape, element, work)
    return vllm_need(shape, element, work, kv_cache_bytes=setting.kv_mib * MIB, context_tokens=setting.context)


def objective(setting: Setting) -> Objective:
    return Objective(cross_entropy=0.0, forward_kl=1.0) if setting.teacher else Objective()


# -- measured, in a process of its own -----------------------------------------------------------------------


def run_measure(model_dir: Path, setting: Setting) -> None:
    import torch

    from sdft_ray.importance.depth import measure
    from sdft_ray.importance.perplexity import DropMoments, drop_losses
    from sdft_ray.models.loading import load_model

    model: Any = load_model(model_dir, setting.dtype)
    rows = max(1, min(setting.num_rows, setting.batch_tokens // setting.row_tokens))
    ids_BT = torch.randint(100, 1000, (rows, setting.row_tokens))
    for _ in range(2):
        measure(model, [(ids_BT, torch.ones_like(ids_BT))])
    if setting.losses:
        empty = DropMoments.empty(model.config.num_hidden_layers, 1)
        drop_losses(model, [(ids_BT[:2], torch.ones_like(ids_BT[:2]))], 1, empty)


def run_train(model_dir: Path, setting: Setting, rank: int, folder: Path) -> None:
    from contextlib import nullcontext

    from sdft_ray.data.packing import Document, pack
    from sdft_ray.models.families import family_of
    from sdft_ray.models.loading import load_model
    from sdft_ray.training.export import save_student
    from sdft_ray.training.loop import train
    from sdft_ray.training.lora import attach, merged
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.parallel import local_group
    from sdft_ray.training.plan import TrainPlan
    from sdft_ray.training.state import save_state

    num_rows = 2 * setting.num_rows * setting.num_workers
    length = setting.document_tokens
    half = length // 2
    document = Document([100 + i % 900 for i in range(length)], [False] * half + [True] * (length - half))
    rows = pack([document] * (num_rows * (setting.row_tokens // length)), setting.row_tokens)
    model: Any = load_model(model_dir, "float32")
    if setting.lora:
        model = attach(model, 8, 16.0, 0.0, family_of(model.config.to_dict()).lora_targets)
    teacher = Teacher(load_model(model_dir, "float32")) if setting.teacher else None
    plan = TrainPlan(
        num_steps=3,
        rows_per_step=num_rows,
        learning_rate=1e-5,
        micro_batch_rows=setting.num_rows,
        precision=setting.dtype,  # type: ignore[arg-type]
        checkpoint_every=3,
        objective=objective(setting),
        activation_checkpointing=setting.checkpointing,
    )
    save: Callable[[Any], None] = lambda state: save_state(folder / "state", state)  # noqa: E731
    group = local_group(rank, setting.num_workers, folder) if setting.num_workers > 1 else nullcontext()
    with group as parallel:
        train(model, rows, plan, teacher=teacher, parallel=parallel, save=None if rank else save)
    if rank == 0:
        save_student(merged(model), model_dir, folder / "student", dtype="float32")


def run_engine(model_dir: Path, setting: Setting) -> None:
    """Ask an engine for texts, or for the likelihoods of the last half of each text."""
    import random

    from sdft_ray.generation.sampler import SamplingParams
    from sdft_ray.generation.scoring import ScoreRequest
    from sdft_ray.recipe.resources import Engine
    from sdft_ray.stages.samplers import local_sampler, prepare_process

    prepare_process()
    engine = Engine(
        kv_cache_bytes=setting.kv_mib * MIB, max_model_tokens=setting.context, max_sequences=setting.num_rows
    )
    sampler = local_sampler(model_dir, setting.sampler, engine, setting.dtype)
    draw = random.Random(0)
    texts = [tuple(draw.randint(100, 1000) for _ in range(setting.row_tokens)) for _ in range(setting.num_rows)]
    if setting.stage == "evaluate":
        asked: list[Any] = [sampler.submit_score(ScoreRequest(ids, len(ids) // 2, (7, 8))) for ids in texts]
    else:
        params = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=setting.new_tokens)
        asked = [sampler.submit_ids(list(ids), params, 0) for ids in texts]
    for future in asked:
        future.result()


def measure_here(model: Path, setting: Setting, rank: int, folder: Path) -> None:
    """Run a setting in this process and print its high-water mark in bytes. Linux only."""
    import ray  # noqa: F401  (a worker has it)
    import torch

    torch.set_num_threads(1)
    if setting.stage == "measure":
        run_measure(model, setting)
    elif setting.stage == "train":
        run_train(model, setting, rank, folder)
    else:
        run_engine(model, setting)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024, flush=True)
    os._exit(0)  # engines leave threads


def measured(model: Path, setting: Setting) -> int:
    """Bytes at the peak, over all processes of a setting."""
    with tempfile.TemporaryDirectory(prefix="sdft-memory-") as folder:
        command = [sys.executable, __file__, str(model), "--inside", json.dumps(asdict(setting)), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            for rank in range(setting.num_workers)
        ]
        told = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, told, strict=True):
        if process.returncode:
            raise SystemExit(f"{setting} ended with {process.returncode}:\n{errors[-2000:]}")
    return sum(int(out.strip().splitlines()[-1]) for out, _ in told)


# -- both ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Bytes, and the terms of the prediction for one process."""

    name: str
    predicted: int
    measured: int
    terms: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.predicted / self.measured

    @property
    def is_within(self) -> bool:
        return abs(self.share - 1) <= WITHIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint; without it the laboratory's teacher alone")
    parser.add_argument("--only", metavar="WORD", help="settings whose name contains it")
    parser.add_argument("--quick", action="store_true", help="four settings")
    parser.add_argument("--inside", nargs=3, metavar=("SETTING", "FOLDER", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        setting, folder, rank = options.inside
        measure_here(options.model, Setting(**json.loads(setting)), int(rank), Path(folder))
    chosen = {name: (TEACHER, setting) for name, setting in LABORATORY.items()}
    if options.model is not None:
        chosen |= {name: (options.model, setting) for name, setting in SETTINGS.items()}
    if options.quick:
        chosen = {name: what for name, what in chosen.items() if name in QUICK}
    if options.only:
        chosen = {name: what for name, what in chosen.items() if options.only in name}
    console, figures = Console(highlight=False), []
    for name, (model, setting) in chosen.items():
        need = predicted(model, setting)
        figures.append(Figure(name, need.total, measured(model, setting), dict(need.terms)))
        show_line(console, figures[-1])
    within = sum(figure.is_within for figure in figures)
    ratio = within / len(figures) if figures else 0.0
    console.print(f"{within} of {len(figures)} settings within {WITHIN:.0%}; bound: all of them.")
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "ratio": ratio,
                "within_bounds": ratio >= BOUND_RATIO,
                "settings": {
                    figure.name: {"predicted": figure.predicted, "measured": figure.measured, "share": figure.share}
                    for figure in figures
                },
            }
        )
    )


def show_line(console: Console, figure: Figure) -> None:
    mark = "" if figure.is_within else "  <- outside"
    terms = ", ".join(f"{name} {value / MIB:,.0f}" for name, value in figure.terms.items() if value >= MIB)
    console.print(
        f"{figure.name:<32} {figure.predicted / MIB:>7,.0f} of {figure.measured / MIB:>7,.0f} MiB "
        f"{figure.share:>5.2f}{mark}",
        soft_wrap=True,
    )
    console.print(f"    {terms}", style="dim", soft_wrap=True)


if __name__ == "__main__":
    main()
