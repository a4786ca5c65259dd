"""Training runs that real processes make together over gloo, and the same by one process, into one folder.

    python -m tests.unit.training.ranks FOLDER RANK WORLD_SIZE

Each run leaves `<strategy>/<case>/records.json`, a training state per step, and rank 0's trained model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.errors import SdftError
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.loop import StepRecord, TrainPlan, train
from sdft_ray.training.lora import attach
from sdft_ray.training.losses import Teacher
from sdft_ray.training.parallel import Parallel, ReplicatedParallel, local_group
from sdft_ray.training.sharding import ShardedParallel
from sdft_ray.training.state import TrainState, load_state, save_state
from sdft_ray.training.tail import tune_tail
from tests.support.tiny import build_model

# Two ranks share five rows, so that the second has a micro-batch less.
PLAN = TrainPlan(num_steps=4, rows_per_step=5, learning_rate=3e-3, micro_batch_rows=2, checkpoint_every=1)
DISTILLED = Objective(cross_entropy=0.5, forward_kl=1.0)
MATCHED = Objective(cross_entropy=0.0, hidden_mse=1.0, hidden_cosine=1.0)


@dataclass(frozen=True)
class Case:
    """What is trained and how. `sharding` goes to `ShardedParallel` alone."""

    plan: TrainPlan = PLAN
    model: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    lora_rank: int = 0
    dropout: float = 0.0
    tail: bool = False
    recompute: bool = False
    sharding: dict[str, Any] = field(default_factory=dict)


CASES = {
    "all": Case(),
    "untied": Case(model={"tied": False}),
    "softcapped": Case(family="gemma2"),
    "lora": Case(lora_rank=4),
    "lora of one row": Case(lora_rank=1, model={"dtype": "bfloat16"}),  # the second rank holds none of A
    "tail": Case(tail=True, model={"tied": False}),
    "clipped": Case(plan=replace(PLAN, clip_norm=0.1, weight_decay=0.1)),
    "one row a step": Case(plan=replace(PLAN, rows_per_step=1)),  # the second rank has none
    "distilled": Case(plan=replace(PLAN, objective=DISTILLED)),
    "matched": Case(plan=replace(PLAN, objective=MATCHED, weight_decay=0.1)),  # nothing reaches head and last norm
    "recomputed": Case(recompute=True),
    "not resharded": Case(sharding={"reshard_after_forward": False}),
    "reduced at once": Case(sharding={"reduce_once": False}),
    "bf16": Case(plan=replace(PLAN, precision="bf16")),
    "bf16 tail": Case(plan=replace(PLAN, precision="bf16"), tail=True, model={"tied": False}),
    "bf16 lora": Case(plan=replace(PLAN, precision="bf16"), lora_rank=4, model={"dtype": "bfloat16"}),
}
"""Cases that every strategy trains alike."""
DROPOUT = Case(lora_rank=4, dropout=0.3)


def sample_rows() -> PackedRows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 24)
    return pack([Document(rng.integers(0, 128, n).tolist(), [i >= n // 2 for i in range(n)]) for n in lengths], 32)


def student(case: Case, *, seed: int = 0) -> Any:
    model: Any = build_model(case.family, num_blocks=2, seed=seed, **case.model)
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.lora_rank:
        model = attach(model, case.lora_rank, 8.0, case.dropout, ["q_proj", "down_proj"])
        with torch.no_grad():  # away from its start at zero, where half of the gradients vanish
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
    return tune_tail(model, 1) if case.tail else model


def run(
    case: Case, parallel: Parallel, folder: Path, *, strategy: str, name: str, resume: TrainState | None = None
) -> Any:
    """Train a case and leave everything in `folder/strategy/name`; the model comes back."""
    here = folder / strategy / name
    here.mkdir(parents=True, exist_ok=True)
    records: list[StepRecord] = []

    def save(state: TrainState) -> None:
        if parallel.rank == 0 or state.part is not None:
            save_state(here / str(state.step), state)

    # Only rank 0 starts right: its weights are used. Frozen ones are nobody's to send, and must be right everywhere.
    right = parallel.rank == 0 or case.lora_rank or case.tail
    model = student(case, seed=0 if right else 9)
    teacher = Teacher(build_model(case.family, num_blocks=3, seed=7), block_map=[0, 2])
    wanted = teacher if case.plan.objective.needs_teacher else None
    train(
        model, sample_rows(), case.plan, teacher=wanted, parallel=parallel, report=records.append, save=save,
        resume=resume,
    )  # fmt: skip
    if parallel.rank == 0:
        (here / "records.json").write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")
        save_file({name: p.detach().clone() for name, p in model.named_parameters()}, here / "model.safetensors")
    return model


def _two_ranks(folder: Path, ddp: ReplicatedParallel) -> None:
    """Every case under both strategies, and runs that continue others."""
    for name, case in CASES.items():
        run(case, ddp, folder, strategy="ddp", name=name)
        run(case, ShardedParallel(**case.sharding), folder, strategy="fsdp", name=name)
    run(DROPOUT, ddp, folder, strategy="ddp", name="dropout")
    run(DROPOUT, ShardedParallel(), folder, strategy="fsdp", name="dropout")
    share: Any = {"rank": ddp.rank, "world_size": ddp.world_size}
    for name, case in {"all": CASES["all"], "bf16": CASES["bf16"], "dropout": DROPOUT}.items():
        state = load_state(folder / "fsdp" / name / "2", **share)
        run(case, ShardedParallel(), folder, strategy="fsdp resumed", name=name, resume=state)
    case = CASES["all"]
    for strategy in ("alone", "ddp"):
        state = load_state(folder / strategy / "all" / "2", **share)
        run(case, ShardedParallel(), folder, strategy=f"{strategy} to fsdp", name="all", resume=state)
    whole = load_state(folder / "fsdp/all/2")
    run(case, ddp, folder, strategy="fsdp to ddp", name="all", resume=whole)
    run(case, ShardedParallel(), folder, strategy="whole to fsdp", name="all", resume=whole)
    _refusals(folder, ddp, whole)


def _refusals(folder: Path, ddp: ReplicatedParallel, whole: TrainState) -> None:
    """What must not be trained; the error of each rank is written down."""
    share: Any = {"rank": ddp.rank, "world_size": ddp.world_size}
    part, others = load_state(folder / "fsdp/all/2", **share), load_state(folder / "fsdp/all/2", rank=0, world_size=3)
    attempts: dict[str, tuple[Case, Parallel, TrainState | None]] = {
        "apart": (CASES["all"], ShardedParallel(), whole if ddp.rank else load_state(folder / "fsdp/all/1")),
        "apart ddp": (CASES["all"], ddp, whole if ddp.rank else None),
        "part": (CASES["all"], ddp, part),
        "others": (CASES["all"], ShardedParallel(), others),
        "muon": (Case(plan=replace(PLAN, optimizer="muon")), ShardedParallel(), None),
    }
    for name, (case, parallel, state) in attempts.items():
        try:
            run(case, parallel, folder, strategy="refused", name=name, resume=state)
            said = "trained"
        except SdftError as error:
            said = f"{type(error).__name__}: {error}"
        (folder / "refused" / f"{name} {ddp.rank}.txt").write_text(said, encoding="utf-8")


def _three_ranks(folder: Path) -> None:
    """Rows that three do not divide evenly, from the start and from the checkpoint of two ranks."""
    run(CASES["all"], ShardedParallel(), folder, strategy="fsdp of three", name="all")
    state = load_state(folder / "fsdp/all/2", rank=ShardedParallel().rank, world_size=3)
    run(CASES["all"], ShardedParallel(), folder, strategy="two to three", name="all", resume=state)


@contextmanager
def ranks(folder: Path, world_size: int, python: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of this module, ended at the latest when the block is left."""
    (folder / f"meeting{world_size}").mkdir()
    command = [python, "-m", "tests.unit.training.ranks", str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size)],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(folder: Path, rank: int, world_size: int) -> None:
    with local_group(rank, world_size, folder / f"meeting{world_size}") as ddp:
        if world_size == 2:
            _two_ranks(folder, ddp)
        else:
            _three_ranks(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
